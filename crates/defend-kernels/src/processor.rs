//! Instructions that not every processor has, found once.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use std::arch::x86_64::{__cpuid, __cpuid_count};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use std::sync::LazyLock;

#[cfg(target_arch = "x86_64")]
use pulp::x86::V4;

/// PanelLayout of the left side that one of AMX's instructions takes: a block's.
pub(super) const TILE_DEPTH: usize = 32;

/// A processor with AVX-512 BF16: there is none without it.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
pub struct PairProcessor {
    pub(super) v4: V4,
}

#[cfg(target_arch = "x86_64")]
impl PairProcessor {
    pub(super) fn detect() -> Option<Self> {
        let v4 = V4::try_new()?;
        std::is_x86_feature_detected!("avx512bf16").then_some(Self { v4 })
    }
}

/// A processor that there is none of.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Debug, Clone, Copy)]
pub enum PairProcessor {}

#[cfg(not(target_arch = "x86_64"))]
impl PairProcessor {
    pub(super) fn detect() -> Option<Self> {
        None
    }
}

/// A processor with AMX for `bf16`, whose use the operating system has granted: there is none without it.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[derive(Debug, Clone, Copy)]
pub struct TileProcessor {
    /// There is no processor with AMX but without the instructions for pairs.
    pub(super) pairs: PairProcessor,
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
impl TileProcessor {
    pub(super) fn detect() -> Option<Self> {
        static FOUND: LazyLock<bool> = LazyLock::new(|| has_unit() && is_granted());
        let pairs = PairProcessor::detect()?;
        FOUND.then_some(Self { pairs })
    }
}

/// A processor that there is none of.
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
#[derive(Debug, Clone, Copy)]
pub enum TileProcessor {}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
impl TileProcessor {
    pub(super) fn detect() -> Option<Self> {
        None
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
/// Whether the processor has AMX with `bf16`.
fn has_unit() -> bool {
    const BF16_PRODUCTS: u32 = 1 << 22;
    const REGISTERS: u32 = 1 << 24;
    // SAFETY: every x86-64 processor has this instruction. The calls are safe functions from Rust 1.94 on.
    #[allow(unused_unsafe)]
    let (leaves, features) = unsafe { (__cpuid(0).eax, __cpuid_count(7, 0).edx) };
    let both = BF16_PRODUCTS | REGISTERS;
    leaves >= 7 && features & both == both
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
/// Asks Linux for the unit's registers, which a process has only after it did; no where it knows no such registers.
///
/// This holds for the whole process: from then on Linux refuses a signal stack that is too small to save them. std's own are
/// large enough.
fn is_granted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILE_DATA: libc::c_long = 18;
    // SAFETY: a call without pointers. It enlarges what the kernel saves of a thread, and is refused where a thread's signal
    // stack is too small for that.
    unsafe {
        libc::syscall(
            libc::SYS_arch_prctl,
            ARCH_REQ_XCOMP_PERM,
            XFEATURE_XTILE_DATA,
        ) == 0
    }
}
