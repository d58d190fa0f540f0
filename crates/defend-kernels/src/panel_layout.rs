//! Activations in blocks of columns, the layout between the products of a transformer block.
//!
//! A matrix `[rows, columns]` is `[blocks, rows, W]`, with a [`width`] W of two vector registers. A block is a panel, as a product
//! over the rows wants its right side, and a few of its columns are a tile, as a gradient of weights wants its left side: both
//! are read in place. As the left side of a product with a matrix, a few rows are copied into a tile, four values at a time.

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::math;
use super::pool::Buffer;
use crate::vectorised;

/// Vectors side by side in a block.
pub const VECTORS: usize = 2;

/// PanelLayout of a block, W: two vector registers of this processor.
pub fn width() -> usize {
    struct Width;
    impl WithSimd for Width {
        type Output = usize;
        fn with_simd<S: Simd>(self, _: S) -> usize {
            VECTORS * S::F32_LANES
        }
    }
    pulp::Arch::new().dispatch(Width)
}

/// How columns are cut into blocks: no block crosses the border of a group (a head), so a group's last one may be
/// partly filled. What its other columns hold means nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PanelLayout {
    /// All columns.
    pub count: usize,
    group: usize,
    /// PanelLayout of a block.
    pub width: usize,
}

impl PanelLayout {
    /// `groups` of equal size; divides `count`.
    pub fn grouped(count: usize, groups: usize) -> Self {
        debug_assert!(count > 0 && count.is_multiple_of(groups));
        Self {
            count,
            group: count / groups,
            width: width(),
        }
    }

    /// In one group.
    pub fn whole(count: usize) -> Self {
        Self::grouped(count, 1)
    }

    fn blocks_per_group(self) -> usize {
        self.group.div_ceil(self.width)
    }

    /// Number of blocks.
    pub fn blocks(self) -> usize {
        self.count / self.group * self.blocks_per_group()
    }

    /// First column of a block and their number.
    #[inline(always)]
    pub fn block(self, i: usize) -> (usize, usize) {
        let (group, within) = (i / self.blocks_per_group(), i % self.blocks_per_group());
        let start = within * self.width;
        (
            group * self.group + start,
            self.width.min(self.group - start),
        )
    }

    /// Some blocks of columns that are one group.
    ///
    /// # Panics
    /// For columns of several groups.
    pub fn part(self, blocks: Range<usize>) -> Self {
        assert_eq!(self.group, self.count);
        let ends = [blocks.start, blocks.end].map(|i| (i * self.width).min(self.count));
        Self::whole(ends[1] - ends[0])
    }

    /// Values of a matrix of so many rows.
    pub fn values(self, rows: usize) -> usize {
        self.blocks() * rows * self.width
    }
}

/// Some rows of a matrix in blocks.
pub struct Rows<'a> {
    /// Each block's rows.
    pub blocks: Vec<&'a [f32]>,
    /// Their number.
    pub count: usize,
    /// How the columns are cut into blocks.
    pub columns: PanelLayout,
}

impl<'a> Rows<'a> {
    /// All rows of a matrix.
    pub fn all(values: &'a [f32], rows: usize, columns: PanelLayout) -> Self {
        let blocks = values.chunks_exact(rows * columns.width);
        Self {
            blocks: blocks.take(columns.blocks()).collect(),
            count: rows,
            columns,
        }
    }

    /// Of blocks that were written to.
    pub fn new(blocks: &'a [&mut [f32]], count: usize, columns: PanelLayout) -> Self {
        Self {
            blocks: blocks.iter().map(|block| &**block).collect(),
            count,
            columns,
        }
    }
}

/// Values that short loops handle at a time: divides W on every processor that has vectors.
const PART: usize = 8;

/// `factor` times the first values of `from`, as many as `to` holds.
#[inline(always)]
fn copy_scaled(to: &mut [f32], from: &[f32], factor: f32) {
    let (from_parts, from_rest) = from[..to.len()].as_chunks::<PART>();
    let (parts, rest) = to.as_chunks_mut::<PART>();
    for (to, from) in parts.iter_mut().zip(from_parts) {
        *to = from.map(|v| factor * v);
    }
    for (to, from) in rest.iter_mut().zip(from_rest) {
        *to = factor * from;
    }
}

/// Writes one row of a matrix of one group to its place in the blocks.
#[inline(always)]
pub fn scatter(blocks: &mut [&mut [f32]], row: usize, values: &[f32], width: usize) {
    for (block, values) in blocks.iter_mut().zip(values.chunks(width)) {
        copy_scaled(&mut block[row * width..][..values.len()], values, 1.0);
    }
}

/// The blocks `[rows, W]` of a matrix to write to.
pub fn split(values: &mut [f32], rows: usize) -> Vec<&mut [f32]> {
    values.chunks_mut(rows * width()).collect()
}

/// The blocks of pieces of `piece` rows, for each of the images of `rows` rows in `values`, piece after piece.
pub fn split_pieces(
    values: &mut [f32],
    columns: PanelLayout,
    rows: usize,
    piece: usize,
) -> Vec<Vec<&mut [f32]>> {
    let pieces = rows.div_ceil(piece);
    let images = values.chunks_mut(columns.values(rows));
    images
        .flat_map(|image| {
            let mut blocks: Vec<Vec<&mut [f32]>> = (0..pieces)
                .map(|_| Vec::with_capacity(columns.blocks()))
                .collect();
            for block in image.chunks_mut(rows * columns.width) {
                for (blocks, part) in blocks
                    .iter_mut()
                    .zip(block.chunks_mut(piece * columns.width))
                {
                    blocks.push(part);
                }
            }
            blocks
        })
        .collect()
}

/// Brings row-major rows into blocks, multiplied by `factor`.
pub fn fill(out: &mut [f32], x: &[f32], columns: PanelLayout, factor: f32) {
    let rows = x.len() / columns.count;
    for (i, block) in out.chunks_exact_mut(rows * columns.width).enumerate() {
        fill_block(block, x, columns, i, factor);
    }
}

/// One block of [`fill`].
pub fn fill_block(block: &mut [f32], x: &[f32], columns: PanelLayout, i: usize, factor: f32) {
    let (first, filled) = columns.block(i);
    vectorised!(|| {
        let rows = x.chunks_exact(columns.count);
        for (line, row) in block.chunks_exact_mut(columns.width).zip(rows) {
            copy_scaled(&mut line[..filled], &row[first..], factor);
        }
    });
}

/// Brings row-major rows into blocks, piece by piece of `piece` rows, on all threads.
pub fn fill_pieces(x: &[f32], columns: PanelLayout, piece: usize) -> Buffer {
    let mut out = Buffer::recycled(columns.values(x.len() / columns.count));
    let pieces = out.par_chunks_mut(columns.values(piece));
    pieces
        .zip(x.par_chunks(piece * columns.count))
        .for_each(|(out, x)| fill(out, x, columns, 1.0));
    out
}

/// Brings blocks into row-major rows: the reverse of [`fill`].
pub fn read(out: &mut [f32], blocks: &[f32], columns: PanelLayout) {
    let rows = out.len() / columns.count;
    let w = columns.width;
    vectorised!(|| {
        for (i, block) in blocks.chunks_exact(rows * w).enumerate() {
            let (first, len) = columns.block(i);
            let rows = out.chunks_exact_mut(columns.count);
            for (line, row) in block.chunks_exact(w).zip(rows) {
                copy_scaled(&mut row[first..first + len], line, 1.0);
            }
        }
    });
}

/// Pieces of rows one after the other, each in blocks: a whole batch.
#[derive(Clone, Copy)]
pub struct Stack<'a> {
    /// All blocks of the first piece, then those of the next.
    pub values: &'a [f32],
    /// Rows of all pieces.
    pub rows: usize,
    /// Rows of a piece; the last may have fewer.
    pub piece: usize,
    /// How the columns are cut into blocks.
    pub columns: PanelLayout,
}

impl<'a> Stack<'a> {
    /// Of one piece.
    pub fn one(values: &'a [f32], rows: usize, columns: PanelLayout) -> Self {
        Self {
            values,
            rows,
            piece: rows,
            columns,
        }
    }

    /// Number of pieces.
    pub fn pieces(&self) -> usize {
        self.rows.div_ceil(self.piece)
    }

    /// A block of a piece, `[rows, W]`.
    #[inline(always)]
    pub fn block(&self, piece: usize, block: usize) -> &'a [f32] {
        let first = piece * self.piece;
        let len = self.piece.min(self.rows - first) * self.columns.width;
        &self.values[self.columns.values(first) + block * len..][..len]
    }
}

/// Sums over the rows of a matrix in blocks.
pub fn column_sums(sums: &mut [f32], values: &[f32], columns: PanelLayout) {
    let blocks = values.chunks_exact(values.len() / columns.blocks());
    vectorised!(|| {
        for (i, block) in blocks.enumerate() {
            let (first, filled) = columns.block(i);
            math::column_sums(&mut sums[first..first + filled], block, columns.width);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_have_blocks_of_their_own() {
        let w = width();
        let columns = PanelLayout::grouped(3 * (w + 1), 3);
        assert_eq!(columns.blocks(), 6);
        assert_eq!(columns.block(2), (w + 1, w));
        assert_eq!(columns.block(3), (2 * w + 1, 1));
        assert_eq!(PanelLayout::whole(2 * w).blocks(), 2);
    }

    #[test]
    fn filled_rows_come_back() {
        let columns = PanelLayout::grouped(10, 2);
        let x: Vec<f32> = (0..30).map(|i| i as f32).collect();
        let mut blocks = vec![f32::NAN; columns.values(3)];
        fill(&mut blocks, &x, columns, 2.0);
        let stack = Stack::one(&blocks, 3, columns);
        for block in 0..columns.blocks() {
            let (first, len) = columns.block(block);
            let rows = stack.block(0, block).chunks(width());
            for (row, line) in rows.enumerate() {
                for (i, value) in line[..len].iter().enumerate() {
                    assert_eq!(*value, 2.0 * x[row * 10 + first + i]);
                }
            }
        }
        let mut back = vec![0.0; 30];
        read(&mut back, &blocks, columns);
        assert!(back.iter().zip(&x).all(|(back, x)| *back == 2.0 * x));
        let expected: Vec<f32> = (0..10).map(|i| 2.0 * (30 + 3 * i) as f32).collect();
        let mut sums = vec![f32::NAN; 10];
        column_sums(&mut sums, &blocks, columns);
        assert_eq!(sums, expected);
    }
}
