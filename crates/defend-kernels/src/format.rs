//! How the values of a packed matrix are written.

use super::microkernel::UNROLL;
use super::panel_layout::PanelLayout;
use super::pool::Buffer;
use super::processor::{PairProcessor, TILE_DEPTH, TileProcessor};
use super::rounding::{round, rounded_pair};

/// How a matrix in panels is multiplied.
#[derive(Debug, Clone, Copy)]
pub enum PackedFormat {
    /// As `f32`, `[blocks, depth, W]`.
    Single,
    /// The same, with both sides rounded to `bf16`.
    Rounded,
    /// As `bf16`, pairs of rows side by side: `[blocks, depth / 2, W, 2]`.
    Pairs(PairProcessor),
    /// In the same form, whole tiles at a time.
    Tiles(TileProcessor),
}

impl PackedFormat {
    /// The fastest way on this processor to multiply rounded values, if the left side is cut so.
    pub fn rounded(depth: PanelLayout) -> Self {
        // What the left side is laid out in consists of whole groups of columns.
        let fits = |group| (0..depth.blocks()).all(|i| depth.block(i).1.is_multiple_of(group));
        if let Some(processor) = TileProcessor::detect().filter(|_| fits(TILE_DEPTH)) {
            return Self::Tiles(processor);
        }
        let processor = PairProcessor::detect().filter(|_| fits(UNROLL));
        processor.map_or(Self::Rounded, Self::Pairs)
    }

    /// Rows of the matrix that lie side by side in a line of a panel.
    #[inline(always)]
    pub(super) fn rows_in_a_line(self) -> usize {
        match self {
            Self::Single | Self::Rounded => 1,
            Self::Pairs(_) | Self::Tiles(_) => 2,
        }
    }

    /// Brings panels of `f32`, `[blocks, depth, W]`, into this form.
    pub fn convert(self, mut panels: Buffer, width: usize) -> Buffer {
        match self {
            Self::Single => panels,
            Self::Rounded => {
                round(&mut panels);
                panels
            }
            Self::Pairs(_) | Self::Tiles(_) => {
                let mut out = Buffer::recycled(panels.len() / 2);
                let values: &mut [u32] = pulp::bytemuck::cast_slice_mut(&mut out);
                let lines = values.chunks_exact_mut(width);
                for (line, rows) in lines.zip(panels.chunks_exact(2 * width)) {
                    let (even, odd) = rows.split_at(width);
                    for ((pair, even), odd) in line.iter_mut().zip(even).zip(odd) {
                        *pair = rounded_pair(*even, *odd);
                    }
                }
                out
            }
        }
    }
}
