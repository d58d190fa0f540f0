//! Multi-head attention of one image on queries, keys and values in blocks.

use std::ops::Range;

use super::bf16::Form;
use super::blocked::{Columns, Rows, Stack, gather, scatter, split};
use super::math;
use super::packed::{Panels, Start, Target, product, transposed_product};
use super::pool::Buffer;
use crate::vectorised;

/// Extents of an image's attention.
#[derive(Clone, Copy)]
pub(crate) struct Heads {
    /// Tokens of the image, T.
    pub(crate) tokens: usize,
    /// Channels of all heads together, D.
    pub(crate) width: usize,
    /// Number of heads; divides D.
    pub(crate) count: usize,
}

/// Memory of a task that computes attention.
pub(crate) struct Scratch {
    /// Probabilities of some queries, in blocks of keys.
    probabilities: Buffer,
    /// Their gradient.
    gradient: Buffer,
    /// Keys, and values, of a head as panels `[blocks of tokens, d, W]`.
    transposed: Buffer,
}

impl Heads {
    /// How queries, keys and values of all heads, 3 D columns, are cut into blocks.
    pub(crate) fn qkv_columns(self) -> Columns {
        Columns::grouped(3 * self.width, 3 * self.count)
    }

    /// The same for the D columns of the output.
    pub(crate) fn output_columns(self) -> Columns {
        Columns::grouped(self.width, self.count)
    }

    /// For so many queries at a time, and for [`Heads::backward`] if need be.
    pub(crate) fn scratch(self, queries: usize, backward: bool) -> Scratch {
        let probabilities = self.keys().values(queries);
        Scratch {
            probabilities: Buffer::stale(probabilities),
            gradient: Buffer::stale(if backward { probabilities } else { 0 }),
            transposed: Buffer::stale(self.keys().values(self.head().count)),
        }
    }

    /// Channels of a head.
    fn head(self) -> Columns {
        Columns::whole(self.width / self.count)
    }

    /// Tokens as columns.
    fn keys(self) -> Columns {
        Columns::whole(self.tokens)
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

    /// Rows `first..first + rows` of a head.
    fn rows(self, blocks: &[f32], head: usize, first: usize, rows: usize) -> Rows<'_> {
        let blocks = self.blocks_of(blocks, head);
        Rows::part(blocks, self.tokens, self.head(), first, rows)
    }

    /// All rows of a head as the right side of a product over tokens.
    fn over_tokens(self, blocks: &[f32], head: usize) -> Panels<'_> {
        Panels {
            form: Form::Single,
            values: self.blocks_of(blocks, head),
            depth: self.keys(),
            columns: self.head(),
        }
    }

    /// All rows of a head as either side of a [`transposed_product`].
    fn stack(self, blocks: &[f32], head: usize) -> Stack<'_> {
        Stack::one(self.blocks_of(blocks, head), self.tokens, self.head())
    }

    /// The transpose of a head, `[d, T]`, as panels in `out`.
    fn transposed<'a>(self, out: &'a mut [f32], blocks: &[f32], head: usize) -> Panels<'a> {
        let (width, d, n) = (self.head().width, self.head().count, self.tokens);
        let blocks = self.blocks_of(blocks, head);
        vectorised!(|| {
            for (i, panel) in out.chunks_exact_mut(d * width).enumerate() {
                let first = i * width;
                let filled = width.min(n - first);
                let lines = panel.chunks_mut(width * width);
                for (lines, block) in lines.zip(blocks.chunks_exact(n * width)) {
                    let tokens = block[first * width..].chunks_exact(width);
                    for (token, channels) in tokens.take(filled).enumerate() {
                        let targets = lines[token..].iter_mut().step_by(width);
                        targets.zip(channels).for_each(|(to, from)| *to = *from);
                    }
                    // Products with what is not filled are thrown away; denormal numbers would make them slow.
                    for line in lines.chunks_exact_mut(width) {
                        line[filled..].fill(0.0);
                    }
                }
            }
        });
        Panels {
            form: Form::Single,
            values: out,
            depth: self.head(),
            columns: self.keys(),
        }
    }

    /// `softmax(Q K^T / sqrt(d))` of one head, in blocks of keys.
    fn probabilities(self, out: &mut [&mut [f32]], q: Rows<'_>, k: Panels<'_>) {
        let (keys, queries) = (self.keys(), q.count);
        product(Target::Blocks(out), Start::Zero, q, k, self.scale());
        let mut line = vec![0f32; self.tokens];
        vectorised!(|| {
            for query in 0..queries {
                gather(&mut line, out, query, keys.width);
                math::softmax_row(&mut line);
                scatter(out, query, &line, keys.width);
            }
        });
    }

    /// Attention of `queries` of an image from `first` on into the blocks of `out` `[queries, D]`; `qkv` holds the image's
    /// blocks, [`Heads::qkv_columns`]. The first query's attention to the other tokens goes into `first_row` `[h, T - 1]`.
    pub(crate) fn attend(
        self,
        out: &mut [&mut [f32]],
        qkv: &[f32],
        (first, queries): (usize, usize),
        scratch: &mut Scratch,
        mut first_row: Option<&mut [f32]>,
    ) {
        let (n, keys) = (self.tokens, self.keys());
        let p = &mut scratch.probabilities[..keys.values(queries)];
        let p = &mut split(p, queries)[..];
        for head in 0..self.count {
            let q = self.rows(qkv, head, first, queries);
            let k = self.transposed(&mut scratch.transposed, qkv, self.count + head);
            self.probabilities(p, q, k);
            if let Some(first_row) = &mut first_row {
                let mut line = vec![0f32; n];
                gather(&mut line, p, 0, keys.width);
                first_row[head * (n - 1)..][..n - 1].copy_from_slice(&line[1..]);
            }
            let v = self.over_tokens(qkv, 2 * self.count + head);
            let out = Target::Blocks(&mut out[self.blocks(head)]);
            product(out, Start::Zero, Rows::of(p, queries, keys), v, 1.0);
        }
    }

    /// Gradient of an image's `qkv` blocks from that of its attention's output `g`, blocks of `[T, D]`.
    pub(crate) fn backward(self, dqkv: &mut [f32], qkv: &[f32], g: &[f32], scratch: &mut Scratch) {
        let (n, keys, scale) = (self.tokens, self.keys(), self.scale());
        let dqkv = &mut split(dqkv, n)[..];
        let Scratch {
            probabilities: p,
            gradient: dp,
            transposed,
        } = scratch;
        for head in 0..self.count {
            let [q, k, v] = [0, 1, 2].map(|which| which * self.count + head);
            let queries = self.rows(qkv, q, 0, n);
            let panels = self.transposed(transposed, qkv, k);
            self.probabilities(&mut split(p, n), queries, panels);
            let over_queries = |out: &mut [&mut [f32]], left: &[f32], right, factor| {
                let left = Stack::one(left, n, keys);
                let blocks = 0..keys.blocks();
                transposed_product(Target::Blocks(out), left, blocks, right, factor);
            };
            over_queries(&mut dqkv[self.blocks(v)], p, self.stack(g, head), 1.0);
            let panels = self.transposed(transposed, qkv, v);
            {
                let (p, dp) = (&mut split(p, n)[..], &mut split(dp, n)[..]);
                let g = self.rows(g, head, 0, n);
                product(Target::Blocks(dp), Start::Zero, g, panels, 1.0);
                // Softmax: dS = P * (dP - sum(P * dP)).
                let (mut line, mut p_line) = (vec![0f32; n], vec![0f32; n]);
                vectorised!(|| {
                    for query in 0..n {
                        gather(&mut line, dp, query, keys.width);
                        gather(&mut p_line, p, query, keys.width);
                        let mean = math::dot(&p_line, &line);
                        let pairs = line.iter_mut().zip(&p_line);
                        pairs.for_each(|(dp, p)| *dp = p * (*dp - mean));
                        scatter(dp, query, &line, keys.width);
                    }
                });
                let ds = Rows::of(dp, n, keys);
                let out = Target::Blocks(&mut dqkv[self.blocks(q)]);
                product(out, Start::Zero, ds, self.over_tokens(qkv, k), scale);
            }
            over_queries(&mut dqkv[self.blocks(k)], dp, self.stack(qkv, q), scale);
        }
    }
}
