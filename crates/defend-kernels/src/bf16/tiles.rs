//! Products of whole tiles by the matrix unit of a processor with AMX.
//!
//! The unit has eight registers of 16 rows of 64 bytes. One instruction multiplies 16 rows of 32 `bf16` with a matrix of 32
//! rows and 16 columns, in pairs of rows as `PackedFormat::Pairs` has them, and adds the product to 16 x 16 `f32`. std has no stable
//! intrinsics for it, but the assembler knows the instructions.

use std::arch::asm;
use std::ops::Range;

use pulp::Simd;
use pulp::x86::V4;

use super::super::gemm::{Product, ROWS_FILLED};
use super::super::panel_layout::Rows;
use super::super::processor::{TILE_DEPTH as DEPTH, TileProcessor};
use super::pairs::pairs_of;

/// Rows of a register.
const ROWS: usize = ROWS_FILLED;
/// Bytes of a register's row.
const LINE: usize = 64;
/// Rows of a tile of the product: two registers.
const TILE: usize = 2 * ROWS;
/// PanelLayout of a tile of the product, a block's: two registers.
const WIDTH: usize = 32;

pub(crate) fn run(processor: TileProcessor, product: Product<'_, '_, '_>) {
    // SAFETY: `detect`, which alone makes a `TileProcessor`, found all features that the function asks for, and the unit.
    unsafe { by_tiles(processor.pairs.v4, product) }
}

/// The unit's registers in the shape that [`multiply`] wants, until this is dropped.
struct Configured;

impl Configured {
    /// # Safety
    ///
    /// The processor has the unit, and the operating system has granted its use.
    unsafe fn new() -> Self {
        #[repr(C, align(64))]
        struct Configuration {
            palette: u8,
            first_row: u8,
            reserved: [u8; 14],
            bytes_of_a_row: [u16; 16],
            rows: [u8; 16],
        }
        let mut configuration = Configuration {
            palette: 1,
            first_row: 0,
            reserved: [0; 14],
            bytes_of_a_row: [0; 16],
            rows: [0; 16],
        };
        configuration.bytes_of_a_row[..8].fill(LINE as u16);
        configuration.rows[..8].fill(ROWS as u8);
        // SAFETY: the unit is there, and reads 64 bytes, which are of a form that it takes: palette 1 has eight registers of up
        // to 16 rows of 64 bytes. Compiled code uses none of them.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, preserves_flags, readonly));
        }
        Self
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        // SAFETY: a value of this type was made by `new`, so the unit is there. Without this, the kernel would go on saving its
        // registers.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) }
    }
}

/// # Safety
///
/// Beside the features named, the processor has the unit, and the operating system has granted its use.
#[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16")]
unsafe fn by_tiles(v4: V4, product: Product<'_, '_, '_>) {
    // SAFETY: what it asks for is what this function asks for.
    let _configured = unsafe { Configured::new() };
    let rows = product.x.count;
    let mut sums = Sums([0.0; TILE * WIDTH]);
    let heights = (0..rows).step_by(TILE).map(|row| TILE.min(rows - row));
    product.by_tiles::<V4>(
        &heights,
        |x, tiles, blocks, depth| {
            let mut rest = tiles;
            for row in (0..x.count).step_by(TILE) {
                let rows = TILE.min(x.count - row);
                let len = filled(rows) * depth / 2;
                let (tile, others) = rest.split_at_mut(len);
                rest = others;
                lay_out(x, row, rows, tile, blocks.clone());
            }
        },
        |x, rows, panel, add, out| {
            let lines = panel.len() / WIDTH;
            let x = &x[..filled(rows) * lines];
            // SAFETY: the unit is there and configured.
            unsafe { multiply(x, panel, &mut sums) };
            let (sums, _) = V4::as_simd_f32s(&sums.0);
            let (sums, _) = sums.as_chunks::<2>();
            for (row, sums) in sums[..rows].iter().enumerate() {
                add.add::<V4, 1>(v4, &mut out[row * add.stride..], [*sums]);
            }
        },
    );
}

/// Rows of a tile in memory.
fn filled(rows: usize) -> usize {
    rows.next_multiple_of(ROWS)
}

/// A few rows of some blocks as pairs, `[blocks, rows, 16, 2]`; what rows beyond them hold means nothing.
#[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16")]
fn lay_out(x: &Rows<'_>, row: usize, rows: usize, tile: &mut [f32], blocks: Range<usize>) {
    let tiles = tile.chunks_exact_mut(filled(rows) * DEPTH / 2);
    for (tile, block) in tiles.zip(&x.blocks[blocks]) {
        let (lines, _) = V4::as_simd_f32s(&block[row * DEPTH..][..rows * DEPTH]);
        let (pairs, _) = V4::as_mut_simd_f32s(tile);
        for (pairs, line) in pairs.iter_mut().zip(lines.as_chunks::<2>().0) {
            *pairs = pairs_of(*line);
        }
    }
}

/// Sums of a tile of the product, row by row.
#[repr(align(64))]
struct Sums([f32; TILE * WIDTH]);

/// A tile of up to 16 or 32 rows, `[depth / 32, rows, 32]` in pairs, times a part of a panel, `[depth / 2, 32, 2]` in pairs.
///
/// # Safety
///
/// The unit is there and configured.
unsafe fn multiply(x: &[f32], panel: &[f32], sums: &mut Sums) {
    const ALL: usize = TILE * DEPTH / 2;
    const HALF: usize = ROWS * DEPTH / 2;
    let steps = panel.len() / (DEPTH / 2 * WIDTH);
    assert_eq!(panel.len(), steps * DEPTH / 2 * WIDTH);
    if steps == 0 {
        return;
    }
    /// Loads of a step of one or two registers of rows, and what is added to which sums.
    macro_rules! steps {
        ($bytes:literal; clear $($clear:literal)*; step $($step:literal)*; store $($store:literal)*) => {
            asm!(
                $($clear,)*
                "2:",
                "tileloadd tmm6, [{panel} + {width}*1]",
                "tileloadd tmm4, [{x} + {line}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{panel} + {width}*1 + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                $($step,)*
                concat!("add {x}, ", $bytes),
                "add {panel}, 2048",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{sums} + {width}*1], tmm0",
                "tilestored [{sums} + {width}*1 + 64], tmm1",
                $($store,)*
                x = inout(reg) x.as_ptr() => _,
                panel = inout(reg) panel.as_ptr() => _,
                steps = inout(reg) steps => _,
                sums = in(reg) &raw mut sums.0,
                line = in(reg) LINE,
                width = in(reg) 2 * LINE,
                out("tmm0") _,
                out("tmm1") _,
                out("tmm2") _,
                out("tmm3") _,
                out("tmm4") _,
                out("tmm5") _,
                out("tmm6") _,
                out("tmm7") _,
                options(nostack),
            )
        };
    }
    if x.len() == steps * ALL {
        // SAFETY: the unit is there, and its registers 0 to 7 have 16 rows of 64 bytes. A step reads 32 rows of 64 bytes of `x`,
        // which has as many for each step, and 16 rows of 128 bytes of `panel`, likewise. At the end 32 rows of 128 bytes
        // are written to `sums`, which has them.
        unsafe {
            steps!(
                "2048";
                clear "tilezero tmm0" "tilezero tmm1" "tilezero tmm2" "tilezero tmm3";
                step "tileloadd tmm5, [{x} + {line}*1 + 1024]" "tdpbf16ps tmm2, tmm5, tmm6" "tdpbf16ps tmm3, tmm5, tmm7";
                store "tilestored [{sums} + {width}*1 + 2048], tmm2" "tilestored [{sums} + {width}*1 + 2112], tmm3"
            );
        }
    } else {
        assert_eq!(x.len(), steps * HALF);
        // SAFETY: as above, with half the rows of `x` and `sums`.
        unsafe { steps!("1024"; clear "tilezero tmm0" "tilezero tmm1"; step; store) }
    }
}
