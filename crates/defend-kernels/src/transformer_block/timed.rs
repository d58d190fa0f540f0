//! Parts of the block as this workspace's benchmarks time them.

use std::sync::{Mutex, PoisonError};

use super::super::attention::Heads;
use super::super::microkernel::{Accumulate, Target};
use super::super::pack::Packed;
use super::super::panel_layout::{PanelLayout, Rows, Stack, split};
use super::super::pool::Buffer;
use super::super::product::product;
use super::{Matrices, Weights};

/// The products of a block with its four matrices, and its attention, each thread for a piece of its own.
#[derive(Debug, Clone, Copy)]
pub struct Timed {
    /// Channels, D.
    pub width: usize,
    /// Heads; divides D.
    pub heads: usize,
    /// Hidden channels of the MLP.
    pub hidden: usize,
    /// Tokens of an image.
    pub tokens: usize,
    /// Rows of the piece.
    pub rows: usize,
}

/// How often a thread does its work before it waits for the others.
const TIMES: usize = 8;

fn noise(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.37).sin()).collect()
}

fn slices([a, b]: &[Vec<f32>; 2]) -> [&[f32]; 2] {
    [a, b]
}

impl Timed {
    /// Multiplications and additions of a thread in [`Timed::products`].
    pub fn operations(self) -> u64 {
        let (d, hidden) = (self.width, self.hidden);
        (TIMES * 2 * self.rows * (4 * d * d + 2 * d * hidden)) as u64
    }

    /// Multiplications and additions of a thread in [`Timed::attention`].
    pub fn attention_operations(self) -> u64 {
        (TIMES * 4 * self.rows * self.tokens * self.width) as u64
    }

    fn heads(self) -> Heads {
        Heads {
            tokens: self.tokens,
            width: self.width,
            count: self.heads,
        }
    }

    /// All four products on each thread, each as a whole, with matrices in `bf16` where `rounded`: the block itself takes the MLP's hidden channels in parts.
    pub fn products(self, rounded: bool) -> impl FnMut() {
        let (d, hidden, rows) = (self.width, self.hidden, self.rows);
        let pair = |outputs: usize, inputs: usize| [noise(outputs * inputs), noise(outputs)];
        let [norm, qkv, projection] = [pair(d, 1), pair(3 * d, d), pair(d, d)];
        let (fc1, fc2) = (pair(hidden, d), pair(d, hidden));
        let weights = Weights {
            norm1: slices(&norm),
            qkv: slices(&qkv),
            projection: slices(&projection),
            norm2: slices(&norm),
            fc1: slices(&fc1),
            fc2: slices(&fc2),
        };
        let matrices = Matrices::forward(&weights, self.heads);
        let matrices = if rounded {
            matrices.rounded()
        } else {
            matrices
        };
        let matrices = matrices.cached();
        let [whole, inner] = [d, hidden].map(PanelLayout::whole);
        let (packed, merged) = (self.heads().qkv_columns(), self.heads().output_columns());
        let filled = |columns: PanelLayout| noise(columns.values(rows));
        let pieces: Vec<_> = (0..rayon::current_num_threads())
            .map(|_| {
                let operands = [whole, merged, inner].map(filled);
                let results = [packed, inner].map(filled);
                (operands, results, noise(rows * d))
            })
            .map(Mutex::new)
            .collect();
        move || {
            rayon::broadcast(|thread| {
                let piece = pieces[thread.index()].lock();
                let mut piece = piece.unwrap_or_else(PoisonError::into_inner);
                let ([z, attended, activated], [qkv, hidden], out) = &mut *piece;
                let to_blocks = |out: &mut [f32], matrix: &Packed| {
                    let target = Target::Panels(&mut split(out, rows));
                    let x = Rows::all(z, rows, whole);
                    product(target, Accumulate::Replace, &x, matrix.panels(), 1.0);
                };
                let mut to_rows = |x: Rows<'_>, matrix: &Packed| {
                    product(
                        Target::RowMajor(out),
                        Accumulate::Add,
                        &x,
                        matrix.panels(),
                        1e-3,
                    );
                };
                for _ in 0..TIMES {
                    to_blocks(qkv, &matrices.qkv);
                    to_blocks(hidden, &matrices.fc1);
                    to_rows(Rows::all(attended, rows, merged), &matrices.projection);
                    to_rows(Rows::all(activated, rows, inner), &matrices.fc2);
                }
            });
        }
    }

    /// Attention of a piece's rows to all tokens of an image on each thread.
    pub fn attention(self) -> impl FnMut() {
        let heads = self.heads();
        let qkv = noise(heads.qkv_columns().values(self.tokens));
        move || {
            rayon::broadcast(|_| {
                let mut scratch = heads.scratch(self.rows, false);
                let mut out = Buffer::recycled(heads.output_columns().values(self.rows));
                let out = &mut split(&mut out, self.rows)[..];
                for _ in 0..TIMES {
                    heads.attend(out, &qkv, (0, self.rows), &mut scratch, None);
                }
            });
        }
    }

    /// Multiplications and additions of all threads together in [`Timed::weight_gradients`].
    pub fn gradient_operations(self, images: usize) -> u64 {
        let (d, hidden) = (self.width, self.hidden);
        (2 * images * self.tokens * (4 * d * d + 2 * d * hidden)) as u64
    }

    /// Gradients of the four matrices from so many images, all threads together.
    pub fn weight_gradients(self, images: usize) -> impl FnMut() {
        let [whole, inner] = [self.width, self.hidden].map(PanelLayout::whole);
        let (packed, merged) = (self.heads().qkv_columns(), self.heads().output_columns());
        let columns = [
            [packed, whole],
            [whole, merged],
            [inner, whole],
            [whole, inner],
        ];
        let sides = columns
            .map(|map| map.map(|columns| (noise(images * columns.values(self.tokens)), columns)));
        let vectors = super::backward::VectorLengths {
            width: self.width,
            hidden: self.hidden,
        };
        let sums = vec![0.0; images * vectors.len()];
        move || {
            let maps = sides.each_ref().map(|map| {
                map.each_ref().map(|(values, columns)| Stack {
                    values,
                    rows: images * self.tokens,
                    piece: self.tokens,
                    columns: *columns,
                })
            });
            std::hint::black_box(super::backward::parameter_gradients(&sums, vectors, &maps));
        }
    }
}
