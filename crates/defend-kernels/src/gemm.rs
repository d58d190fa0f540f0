//! Products of activations in [`super::panel_layout`] layout with a matrix in panels, part by part, so that the tiles of the one and the
//! panels of the other stay in the cache.
//!
//! `gemm` packs both operands of every product. Here a weight matrix is packed once a call, or once for good where it
//! is frozen; activations are panels as they are. Only the left side of a product is copied, into tiles that stay in the cache.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::format::PackedFormat;
use super::microkernel::{
    Accumulate, ByRow, Epilogue, Heights, PANEL_BYTES, Target, UNROLL, interleave, most_rows,
};
use super::pack::PackedView;
use super::panel_layout::{Rows, VECTORS};
use super::pool::Buffer;
use super::prefetch::{LINE, prefetch};
use super::rounding::round;

/// Rows of the left side are laid out in a multiple of these at most.
pub(super) const ROWS_FILLED: usize = 16;

pub(super) struct Product<'p, 't, 'a> {
    pub(super) out: Target<'t, 'a>,
    pub(super) start: Accumulate<'p>,
    pub(super) x: &'p Rows<'p>,
    pub(super) matrix: PackedView<'p>,
    pub(super) factor: f32,
}

impl Rows<'_> {
    /// PanelLayout of some blocks as tiles one after the other, each `[columns / UNROLL, height, UNROLL]` and then, for the columns
    /// that are left, `[columns, height]`: a tile's values lie in the order in which its product reads them.
    #[inline(always)]
    fn tiles(&self, out: &mut [f32], blocks: Range<usize>, depth: usize, heights: Heights) {
        let width = self.columns.width;
        let grouped = depth / UNROLL * UNROLL;
        let (mut row, mut rest) = (0, out);
        for height in heights {
            let (tile, others) = rest.split_at_mut(height * depth);
            rest = others;
            let (groups, left) = tile.split_at_mut(height * grouped);
            let mut k = 0usize;
            for block in blocks.clone() {
                let filled = self.columns.block(block).1;
                let (lines, next) = self.blocks[block][row * width..].split_at(height * width);
                // The next tile's, which are not where a processor would expect them.
                prefetch(&next[..next.len().min(height * width)]);
                if k.is_multiple_of(UNROLL) && filled.is_multiple_of(UNROLL) {
                    let groups = &mut groups[k * height..][..filled * height];
                    interleave(groups, lines, width, height);
                } else {
                    for (r, line) in lines.chunks_exact(width).enumerate() {
                        for (k, value) in (k..).zip(&line[..filled]) {
                            if k < grouped {
                                let group = k / UNROLL * height + r;
                                groups[group * UNROLL + k % UNROLL] = *value;
                            } else {
                                left[(k - grouped) * height + r] = *value;
                            }
                        }
                    }
                }
                k += filled;
            }
            row += height;
        }
    }

    /// The longest run of blocks from `from` on whose columns are at most `most` together, or one block; and those columns.
    fn run(&self, from: usize, most: usize) -> (Range<usize>, usize) {
        let (mut to, mut depth) = (from, 0);
        while to < self.columns.blocks() {
            let filled = self.columns.block(to).1;
            if to > from && depth + filled > most {
                break;
            }
            depth += filled;
            to += 1;
        }
        (from..to, depth)
    }
}

impl Product<'_, '_, '_> {
    /// Goes through the matrix part by part, in tiles of so many rows: `lay_out` brings a part of the left side's columns, those
    /// of some blocks and their number, into the order in which `multiply` reads it. That takes the tile's values and what
    /// follows them, its number of rows, the part of a panel, and where the product goes.
    #[inline(always)]
    pub(super) fn by_tiles<S: Simd>(
        mut self,
        heights: &(impl Iterator<Item = usize> + Clone),
        lay_out: impl Fn(&Rows<'_>, &mut [f32], Range<usize>, usize),
        mut multiply: impl FnMut(&[f32], usize, &[f32], Epilogue<'_>, &mut [f32]),
    ) {
        let (depth, columns) = (self.matrix.depth.count, self.matrix.columns);
        let (first_row, all_rows) = (self.matrix.first_row, self.matrix.all_rows);
        let rows_in_a_line = self.matrix.form.rows_in_a_line();
        let width = VECTORS * S::F32_LANES;
        assert_eq!(width, columns.width);
        let most = PANEL_BYTES / (4 * width) * rows_in_a_line;
        // In pairs, values need half the memory, but the last tile's rows may be filled up.
        let laid_out = self.x.count.next_multiple_of(ROWS_FILLED);
        let mut tiles = Buffer::of_thread(laid_out * depth.min(most.max(width)));
        let (mut block, mut from) = (0, 0);
        while block < self.x.columns.blocks() {
            let (blocks, part) = self.x.run(block, most);
            let tiles = &mut tiles[..laid_out * part];
            lay_out(self.x, tiles, blocks.clone(), part);
            let lines = part / rows_in_a_line;
            let before = (first_row + from) / rows_in_a_line * width;
            // Each tile asks for its share of the next panel: a processor does not expect one so far away.
            let count = heights.clone().count().max(1);
            let share = (lines * width / LINE).div_ceil(count).max(1) * LINE;
            let panels = self.matrix.values;
            let panels = panels.chunks_exact(all_rows / rows_in_a_line * width);
            let panels = panels.map(|panel| &panel[before..][..lines * width]);
            let mut panels = panels.enumerate().peekable();
            while let Some((i, panel)) = panels.next() {
                let mut next = panels
                    .peek()
                    .map_or(&[][..], |(_, next)| next)
                    .chunks(share);
                let (first, filled) = columns.block(i);
                let start = match self.start {
                    _ if from > 0 => Accumulate::Add,
                    Accumulate::Bias(bias) => Accumulate::Bias(&bias[first..first + filled]),
                    start => start,
                };
                let (out, stride) = self.out.block(i, columns);
                let add = Epilogue {
                    filled,
                    stride,
                    start,
                    factor: self.factor,
                };
                let mut row = 0;
                for rows in heights.clone() {
                    prefetch(next.next().unwrap_or_default());
                    let x = &tiles[row * lines..];
                    multiply(x, rows, panel, add, &mut out[row * stride..]);
                    row += rows;
                }
            }
            (block, from) = (blocks.end, from + part);
        }
    }

    /// The same for tiles whose values meet a panel one by one; `prepare` brings them into the matrix's form.
    #[inline(always)]
    pub(super) fn by_tiles_of_values<S: Simd>(
        self,
        prepare: impl Fn(&mut [f32]),
        multiply: impl Fn(&[f32], usize, &[f32], Epilogue<'_>, &mut [f32]),
    ) {
        let heights = Heights::new(self.x.count, most_rows::<S>());
        self.by_tiles::<S>(
            &heights,
            #[inline(always)]
            |x, tiles, blocks, depth| {
                let tiles = &mut tiles[..x.count * depth];
                x.tiles(tiles, blocks, depth, heights.clone());
                prepare(tiles);
            },
            multiply,
        );
    }
}

impl WithSimd for Product<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let rounded = matches!(self.matrix.form, PackedFormat::Rounded);
        self.by_tiles_of_values::<S>(
            #[inline(always)]
            |tiles| {
                if rounded {
                    round(tiles);
                }
            },
            #[inline(always)]
            |x, rows, panel, add, out| {
                let (panel, _) = S::as_simd_f32s(panel);
                ByRow { x, panel, add }.run(simd, rows, out);
            },
        );
    }
}
