//! Multi-head attention of one image on queries, keys and values in blocks.

use std::ops::Range;

use super::math;
use super::microkernel::{Accumulate, Target};
use super::pack::PackedView;
use super::panel_layout::{PanelLayout, Rows, Stack, split};
use super::pool::Buffer;
use super::product::product;
use super::weight_gradient::transposed_product;
use crate::vectorised;

/// Extents of an image's attention.
#[derive(Clone, Copy)]
pub struct Heads {
    /// Tokens of the image, T.
    pub tokens: usize,
    /// Channels of all heads together, D.
    pub width: usize,
    /// Number of heads; divides D.
    pub count: usize,
}

/// Memory of a task that computes attention.
pub struct Scratch {
    /// Probabilities of some queries, `[blocks of queries, T, W]`.
    probabilities: Buffer,
    /// Their gradient.
    gradient: Buffer,
    /// What queries of a head, or their gradient, are as panels `[blocks of queries, d, W]`.
    transposed: Buffer,
}

impl Heads {
    /// How queries, keys and values of all heads, 3 D columns, are cut into blocks.
    pub fn qkv_columns(self) -> PanelLayout {
        PanelLayout::grouped(3 * self.width, 3 * self.count)
    }

    /// The same for the D columns of the output.
    pub fn output_columns(self) -> PanelLayout {
        PanelLayout::grouped(self.width, self.count)
    }

    /// For so many queries at a time, and for [`Heads::backward`] if need be.
    pub fn scratch(self, queries: usize, backward: bool) -> Scratch {
        let queries = PanelLayout::whole(queries);
        let probabilities = queries.values(self.tokens);
        Scratch {
            probabilities: Buffer::recycled(probabilities),
            gradient: Buffer::recycled(if backward { probabilities } else { 0 }),
            transposed: Buffer::recycled(queries.values(self.head().count)),
        }
    }

    /// Channels of a head.
    fn head(self) -> PanelLayout {
        PanelLayout::whole(self.width / self.count)
    }

    fn scale(self) -> f32 {
        (1.0 / (self.head().count as f64).sqrt()) as f32
    }

    /// The part of a matrix of several heads that is one head's.
    fn blocks_of(self, blocks: &[f32], head: usize) -> &[f32] {
        let len = self.head().values(self.tokens);
        &blocks[head * len..][..len]
    }

    /// Blocks of a head in a matrix of several heads; in [`Heads::qkv_columns`], keys and values are further heads.
    fn blocks(self, head: usize) -> Range<usize> {
        let blocks = self.head().blocks();
        head * blocks..(head + 1) * blocks
    }

    /// All rows of a head.
    fn rows(self, blocks: &[f32], head: usize) -> Rows<'_> {
        Rows::all(self.blocks_of(blocks, head), self.tokens, self.head())
    }

    /// All rows of a head as the right side of a product over tokens.
    fn over_tokens(self, blocks: &[f32], head: usize) -> PackedView<'_> {
        let values = self.blocks_of(blocks, head);
        PackedView::new(values, PanelLayout::whole(self.tokens), self.head())
    }

    /// All rows of a head as the right side of a [`transposed_product`].
    fn stack(self, blocks: &[f32], head: usize) -> Stack<'_> {
        Stack::one(self.blocks_of(blocks, head), self.tokens, self.head())
    }

    /// The transpose of `count` rows of a head from `first` on, `[d, count]`, as panels in `out`.
    fn transposed<'a>(
        self,
        out: &'a mut [f32],
        blocks: &[f32],
        head: usize,
        (first, count): (usize, usize),
    ) -> PackedView<'a> {
        let (width, d, n) = (self.head().width, self.head().count, self.tokens);
        let columns = PanelLayout::whole(count);
        let out = &mut out[..columns.values(d)];
        let blocks = self.blocks_of(blocks, head);
        vectorised!(|| {
            for (i, panel) in out.chunks_exact_mut(d * width).enumerate() {
                let (start, filled) = columns.block(i);
                let lines = panel.chunks_mut(width * width);
                for (lines, block) in lines.zip(blocks.chunks_exact(n * width)) {
                    let rows = &block[(first + start) * width..][..filled * width];
                    math::transpose(lines, rows, width);
                }
            }
        });
        PackedView::new(out, self.head(), columns)
    }

    /// `exp(K Q^T / sqrt(d) - m)` of one head, `[blocks of queries, T, W]`, with the largest logit m of each query, and what
    /// makes probabilities of a query's values: the inverse of their sum, `[blocks of queries, W]`.
    ///
    /// Queries are columns, so that softmax goes on for a whole vector of them at a time.
    fn exponentials(self, out: &mut [f32], k: &Rows<'_>, q: PackedView<'_>) -> Vec<f32> {
        let (n, width) = (self.tokens, q.columns.width);
        let target = Target::Panels(&mut split(out, n));
        product(target, Accumulate::Replace, k, q, self.scale());
        let mut factors = vec![0f32; q.columns.blocks() * width];
        vectorised!(|| {
            let blocks = out.chunks_exact_mut(n * width);
            for (block, factors) in blocks.zip(factors.chunks_exact_mut(width)) {
                math::exp_columns(block, factors);
            }
        });
        factors
    }

    /// Attention of `queries` of an image from `first` on into the blocks of `out` `[queries, D]`; `qkv` holds the image's
    /// blocks, [`Heads::qkv_columns`]. The first query's attention to the other tokens goes into `first_row` `[h, T - 1]`.
    pub fn attend(
        self,
        out: &mut [&mut [f32]],
        qkv: &[f32],
        (first, queries): (usize, usize),
        scratch: &mut Scratch,
        mut first_row: Option<&mut [f32]>,
    ) {
        let (n, width) = (self.tokens, self.head().width);
        let columns = PanelLayout::whole(queries);
        let p = &mut scratch.probabilities[..columns.values(n)];
        for head in 0..self.count {
            let q = self.transposed(&mut scratch.transposed, qkv, head, (first, queries));
            let k = self.rows(qkv, self.count + head);
            let factors = self.exponentials(p, &k, q);
            if let Some(first_row) = &mut first_row {
                let row = &mut first_row[head * (n - 1)..][..n - 1];
                for (to, line) in row.iter_mut().zip(p[width..].chunks_exact(width)) {
                    *to = line[0] * factors[0];
                }
            }
            let v = self.stack(qkv, 2 * self.count + head);
            let out = &mut out[self.blocks(head)];
            let p = Stack::one(p, n, columns);
            transposed_product(Target::Panels(out), p, 0..columns.blocks(), v, 1.0);
            vectorised!(|| {
                for block in out.iter_mut() {
                    for (line, factor) in block.chunks_exact_mut(width).zip(&factors) {
                        for value in line {
                            *value *= factor;
                        }
                    }
                }
            });
        }
    }

    /// Gradient of an image's `qkv` blocks from that of its attention's output `g`, blocks of `[T, D]`.
    pub fn backward(self, dqkv: &mut [f32], qkv: &[f32], g: &[f32], scratch: &mut Scratch) {
        let (n, width, scale) = (self.tokens, self.head().width, self.scale());
        let dqkv = &mut split(dqkv, n)[..];
        let columns = PanelLayout::whole(n);
        let Scratch {
            probabilities: p,
            gradient: dp,
            transposed,
        } = scratch;
        for head in 0..self.count {
            let [q, k, v] = [0, 1, 2].map(|which| which * self.count + head);
            let panels = self.transposed(transposed, qkv, q, (0, n));
            let factors = self.exponentials(p, &self.rows(qkv, k), panels);
            let panels = self.transposed(transposed, g, head, (0, n));
            let target = Target::Panels(&mut split(dp, n));
            product(target, Accumulate::Replace, &self.rows(qkv, v), panels, 1.0);
            vectorised!(|| {
                let blocks = p.chunks_exact_mut(n * width);
                let blocks = blocks.zip(dp.chunks_exact_mut(n * width));
                for ((p, dp), factors) in blocks.zip(factors.chunks_exact(width)) {
                    math::softmax_columns_backward(p, dp, factors);
                }
            });
            // Over the queries.
            let mut to_keys = |which: usize, left: &mut [f32], right, factor| {
                let out = Target::Panels(&mut dqkv[self.blocks(which)]);
                let left = Rows::all(left, n, columns);
                product(out, Accumulate::Replace, &left, right, factor);
            };
            to_keys(v, p, self.over_tokens(g, head), 1.0);
            to_keys(k, dp, self.over_tokens(qkv, q), scale);
            let out = Target::Panels(&mut dqkv[self.blocks(q)]);
            let left = Stack::one(dp, n, columns);
            transposed_product(out, left, 0..columns.blocks(), self.stack(qkv, k), scale);
        }
    }
}
