//! Memory that will be read soon, asked for while the multipliers are busy.

/// Values of a cache line.
pub(super) const LINE: usize = 16;

/// Brings values into the L1 cache, on x86; elsewhere nothing happens.
#[inline(always)]
pub(super) fn prefetch(values: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    for line in values.chunks(LINE) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: part of SSE, which every x86-64 processor has. It is a hint, which reads nothing and may have any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = values;
}
