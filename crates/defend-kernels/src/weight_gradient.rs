//! Gradients of weights: products of two activations over their rows.

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::microkernel::{
    Accumulate, Epilogue, Heights, PANEL_BYTES, Target, UNROLL, every_height, most_rows,
};
use super::panel_layout::{Stack, VECTORS};
use super::prefetch::prefetch;

/// A few columns times a block, over the rows of both: gradients of weights.
struct ByColumn<'a> {
    left: Stack<'a>,
    right: Stack<'a>,
    /// Pieces of both.
    pieces: Range<usize>,
    /// Block of the left side, and the tile's first column in it.
    from: (usize, usize),
    /// Block of the right side.
    to: usize,
    add: Epilogue<'a>,
}

/// Tiles of each height: see [`super::microkernel`].
macro_rules! tiles {
    ($($height:literal $by_row:ident $by_column:ident: $($i:literal $x:ident $low:ident $high:ident),*;)*) => {
        impl ByColumn<'_> {
            #[inline(always)]
            fn run<S: Simd>(&self, simd: S, columns: usize, out: &mut [f32]) {
                match columns {
                    $($height if $height <= most_rows::<S>() => self.$by_column(simd, out),)*
                    _ => unreachable!("a tile of {columns} columns"),
                }
            }

            $(
                #[inline(always)]
                fn $by_column<S: Simd>(&self, simd: S, out: &mut [f32]) {
                    let width = VECTORS * S::F32_LANES;
                    $(
                        let mut $low = simd.splat_f32s(0.0);
                        let mut $high = simd.splat_f32s(0.0);
                    )*
                    for piece in self.pieces.clone() {
                        let left = self.left.block(piece, self.from.0);
                        let (right, _) = S::as_simd_f32s(self.right.block(piece, self.to));
                        let (steps, rest) = right.as_chunks::<{ UNROLL * VECTORS }>();
                        for (values, lines) in left.chunks_exact(UNROLL * width).zip(steps) {
                            let values = &values[self.from.1..][..(UNROLL - 1) * width + $height];
                            for k in 0..UNROLL {
                                $(
                                    let value = simd.splat_f32s(values[k * width + $i]);
                                    $low = simd.mul_add_e_f32s(value, lines[VECTORS * k], $low);
                                    $high = simd.mul_add_e_f32s(value, lines[VECTORS * k + 1], $high);
                                )*
                            }
                        }
                        for (k, line) in rest.chunks_exact(VECTORS).enumerate() {
                            let values = &left[(steps.len() * UNROLL + k) * width + self.from.1..][..$height];
                            $(
                                let value = simd.splat_f32s(values[$i]);
                                $low = simd.mul_add_e_f32s(value, line[0], $low);
                                $high = simd.mul_add_e_f32s(value, line[1], $high);
                            )*
                        }
                    }
                    self.add.add(simd, out, [$([$low, $high]),*]);
                }
            )*
        }
    };
}

every_height!(tiles);

/// `factor G^T X` for the columns of some blocks of `left`, G, and all of `right`, X, over their rows.
///
/// An element's sum is taken in an order that depends on nothing but the pieces.
///
/// # Panics
/// When the sides do not fit each other.
pub fn transposed_product(
    out: Target<'_, '_>,
    left: Stack<'_>,
    blocks: Range<usize>,
    right: Stack<'_>,
    factor: f32,
) {
    assert_eq!((left.rows, left.piece), (right.rows, right.piece));
    for side in [&left, &right] {
        assert_eq!(side.values.len(), side.columns.values(side.rows));
    }
    assert!(blocks.end <= left.columns.blocks());
    let rows = blocks.clone().map(|block| left.columns.block(block).1);
    out.check(rows.sum(), right.columns);
    pulp::Arch::new().dispatch(TransposedProduct {
        out,
        left,
        blocks,
        right,
        factor,
    });
}

struct TransposedProduct<'p, 't, 'a> {
    out: Target<'t, 'a>,
    left: Stack<'p>,
    blocks: Range<usize>,
    right: Stack<'p>,
    factor: f32,
}

impl WithSimd for TransposedProduct<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let columns = self.left.columns;
        let width = VECTORS * S::F32_LANES;
        // Whole pieces whose rows of one block stay in the L1 cache.
        let step = (PANEL_BYTES / (4 * width) / self.left.piece).max(1);
        let first_row = columns.block(self.blocks.start).0;
        for from in (0..self.left.pieces()).step_by(step) {
            let pieces = from..(from + step).min(self.left.pieces());
            let start = if from == 0 {
                Accumulate::Replace
            } else {
                Accumulate::Add
            };
            for to in 0..self.right.columns.blocks() {
                let (out, stride) = self.out.block(to, self.right.columns);
                let add = Epilogue {
                    filled: self.right.columns.block(to).1,
                    stride,
                    start,
                    factor: self.factor,
                };
                for block in self.blocks.clone() {
                    let (first, filled) = columns.block(block);
                    let mut column = 0;
                    let heights = Heights::new(filled, most_rows::<S>());
                    // What comes after this block from far away: the left side in the first round, a block of the right in each.
                    let unread = if block + 1 < self.blocks.end {
                        (to == 0).then_some((self.left, block + 1))
                    } else {
                        (to + 1 < self.right.columns.blocks()).then_some((self.right, to + 1))
                    };
                    let tiles = heights.tiles;
                    for (i, height) in heights.enumerate() {
                        if let Some((side, block)) = unread {
                            for piece in pieces.clone() {
                                let values = side.block(piece, block);
                                let share = |i: usize| values.len() * i / tiles;
                                prefetch(&values[share(i)..share(i + 1)]);
                            }
                        }
                        let tile = ByColumn {
                            left: self.left,
                            right: self.right,
                            pieces: pieces.clone(),
                            from: (block, column),
                            to,
                            add,
                        };
                        let row = first - first_row + column;
                        tile.run(simd, height, &mut out[row * stride..]);
                        column += height;
                    }
                }
            }
        }
    }
}

/// Blocks of the left side that a task works on at most: their rows' part stays in the L2 cache.
const BLOCKS_PER_TASK: usize = 8;

/// `G^T X`, `[G's columns, X's columns]`, row-major, on all threads: the gradient of a map's weights from that of its output
/// and its input.
pub fn weight_gradient(g: Stack<'_>, x: Stack<'_>) -> Vec<f32> {
    let inputs = x.columns.count;
    let mut out = vec![0f32; g.columns.count * inputs];
    // Three tasks a thread: with fewer a thread waits longer for the last, with more the right side is read more often. A sum does not
    // depend on its task.
    let blocks = g.columns.blocks();
    let per_task = blocks.div_ceil(3 * rayon::current_num_threads());
    let per_task = per_task.clamp(1, BLOCKS_PER_TASK);
    let mut tasks = Vec::new();
    let mut rest = &mut out[..];
    for first in (0..blocks).step_by(per_task) {
        let blocks = first..(first + per_task).min(blocks);
        let rows: usize = blocks.clone().map(|block| g.columns.block(block).1).sum();
        let (out, others) = rest.split_at_mut(rows * inputs);
        tasks.push((out, blocks));
        rest = others;
    }
    tasks.into_par_iter().for_each(|(out, blocks)| {
        transposed_product(Target::RowMajor(out), g, blocks, x, 1.0);
    });
    out
}

#[cfg(test)]
mod tests {
    use super::super::panel_layout::{PanelLayout, fill};
    use super::*;

    fn noise(len: usize, step: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * step).sin()).collect()
    }

    fn blocks(x: &[f32], columns: PanelLayout) -> Vec<f32> {
        let mut blocks = vec![f32::NAN; columns.values(x.len() / columns.count)];
        fill(&mut blocks, x, columns, 1.0);
        blocks
    }

    #[test]
    fn weight_gradients_match_loops() {
        for (pieces, piece, rows, columns) in [
            (1, 5, 3, 3),
            (4, 100, 12, 16),
            (9, 100, 250, 40),
            (3, 7, 13, 33),
            (2, 9, 1, 64),
            (2, 9, 2, 5),
        ] {
            // The last piece is not whole.
            let depth = pieces * piece - piece / 3;
            let (g, x) = (noise(depth * rows, 0.37), noise(depth * columns, 0.73));
            let [gs, xs] = [(&g, rows), (&x, columns)].map(|(values, count)| {
                let columns = PanelLayout::whole(count);
                let pieces = values.chunks(piece * count);
                (
                    pieces.flat_map(|x| blocks(x, columns)).collect::<Vec<_>>(),
                    columns,
                )
            });
            let stack = |(values, columns)| Stack {
                values,
                rows: depth,
                piece,
                columns,
            };
            let found = weight_gradient(stack((&gs.0, gs.1)), stack((&xs.0, xs.1)));
            assert_eq!(found.len(), rows * columns);
            for (i, found) in found.iter().enumerate() {
                let (r, c) = (i / columns, i % columns);
                let terms =
                    (0..depth).map(|k| f64::from(g[k * rows + r]) * f64::from(x[k * columns + c]));
                let expected = terms.sum::<f64>();
                assert!(
                    (f64::from(*found) - expected).abs() < 1e-4,
                    "{depth} {rows} {columns} at {i}"
                );
            }
        }
    }
}
