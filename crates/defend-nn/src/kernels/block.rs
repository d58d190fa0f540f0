//! A whole pre-norm transformer block on slices: forward, and the backward pass written by hand.
//!
//! Work is cut into pieces of one image's rows, so that everything between two products stays in the cache, and a row's
//! result depends neither on the batch nor on the number of threads.

use rayon::prelude::*;

use super::attention::Heads;
use super::math;
use super::packed::{Packed, Start, product, transposed_product};
use super::pool::Buffer;
use super::{column_sums, norm};
use crate::vectorised;

/// Rows of an image that a task handles at most.
const ROWS_PER_PIECE: usize = 128;

/// Weights of a block: matrices `[O, I]` row-major, vectors `[O]`.
#[derive(Clone, Copy)]
pub(crate) struct Weights<'a> {
    pub(crate) norm1: [&'a [f32]; 2],
    pub(crate) qkv: [&'a [f32]; 2],
    pub(crate) projection: [&'a [f32]; 2],
    pub(crate) norm2: [&'a [f32]; 2],
    pub(crate) fc1: [&'a [f32]; 2],
    pub(crate) fc2: [&'a [f32]; 2],
}

/// The four matrices of a block, laid out for the rows that they are multiplied with.
#[derive(Debug)]
pub(crate) struct Matrices {
    qkv: Packed,
    projection: Packed,
    fc1: Packed,
    fc2: Packed,
}

impl Matrices {
    /// For [`forward`]: `W^T`.
    pub(crate) fn forward(weights: &Weights<'_>) -> Self {
        let pack = |[matrix, bias]: [&[f32]; 2]| {
            Packed::transposed(matrix, matrix.len() / bias.len(), bias.len())
        };
        Self::of(weights, pack)
    }

    /// For the gradients of the maps' inputs: `W`.
    fn backward(weights: &Weights<'_>) -> Self {
        let pack = |[matrix, bias]: [&[f32]; 2]| {
            Packed::new(matrix, bias.len(), matrix.len() / bias.len())
        };
        Self::of(weights, pack)
    }

    /// For more than one pass.
    pub(crate) fn kept(mut self) -> Self {
        for matrix in [
            &mut self.qkv,
            &mut self.projection,
            &mut self.fc1,
            &mut self.fc2,
        ] {
            matrix.keep();
        }
        self
    }

    fn of(weights: &Weights<'_>, pack: impl Fn([&[f32]; 2]) -> Packed) -> Self {
        Self {
            qkv: pack(weights.qkv),
            projection: pack(weights.projection),
            fc1: pack(weights.fc1),
            fc2: pack(weights.fc2),
        }
    }
}

/// Extents of a block's input and what is constant in a call.
#[derive(Clone, Copy)]
pub(crate) struct Shape<'a> {
    /// Images, B.
    pub(crate) images: usize,
    /// Tokens of an image, T.
    pub(crate) tokens: usize,
    /// Channels, D.
    pub(crate) width: usize,
    /// Hidden channels of the MLP.
    pub(crate) hidden: usize,
    pub(crate) heads: usize,
    pub(crate) eps: f32,
    /// Factors of both residual branches for each image; one without.
    pub(crate) factors: Option<[&'a [f32]; 2]>,
}

/// Activations that the backward pass needs, `[B T, ...]`.
pub(crate) struct Saved {
    /// Queries, keys and values.
    qkv: Buffer,
    /// Output of the attention before its projection.
    attended: Buffer,
    /// Input of the MLP's branch.
    middle: Buffer,
    /// The MLP's hidden values before GELU.
    hidden: Buffer,
}

/// Gradients of a block's parameters, in the order of [`Weights`]: matrix, then vector.
pub(crate) type Gradients = [Vec<f32>; 12];

impl Shape<'_> {
    fn rows(&self) -> usize {
        self.images * self.tokens
    }

    fn heads(&self) -> Heads {
        Heads {
            tokens: self.tokens,
            width: self.width,
            count: self.heads,
        }
    }

    fn factor(&self, branch: usize, image: usize) -> f32 {
        self.factors.map_or(1.0, |factors| factors[branch][image])
    }

    /// Rows of a piece: an image cut evenly.
    fn piece(&self) -> usize {
        self.tokens.div_ceil(self.tokens.div_ceil(ROWS_PER_PIECE))
    }

    /// Rows `[B T, columns]` cut into pieces, image by image.
    fn pieces<'a>(&self, rows: &'a mut [f32], columns: usize) -> Vec<&'a mut [f32]> {
        let piece = self.piece() * columns;
        let images = rows.chunks_mut(self.tokens * columns);
        images.flat_map(|image| image.chunks_mut(piece)).collect()
    }

    /// Image and first row of each piece.
    fn origins(&self) -> Vec<(usize, usize)> {
        let starts = (0..self.tokens).step_by(self.piece());
        let starts: Vec<usize> = starts.collect();
        (0..self.images)
            .flat_map(|image| starts.iter().map(move |&start| (image, start)))
            .collect()
    }
}

/// `out = x + factor (y W^T + b)`.
fn residual(out: &mut [f32], x: &[f32], y: &[f32], weight: &Packed, bias: &[f32], factor: f32) {
    let outputs = bias.len();
    if factor == 0.0 {
        out.copy_from_slice(x);
        return;
    }
    for (out, x) in out.chunks_exact_mut(outputs).zip(x.chunks_exact(outputs)) {
        for ((o, &x), &b) in out.iter_mut().zip(x).zip(bias) {
            *o = x + factor * b;
        }
    }
    product(out, Start::Kept, y, weight, factor);
}

/// The packed queries, keys and values of all rows, `[B T, 3 D]`.
fn queries_keys_values(
    shape: &Shape<'_>,
    weights: &Weights<'_>,
    matrices: &Matrices,
    x: &[f32],
) -> Buffer {
    let (n, d, rows) = (shape.tokens, shape.width, shape.rows());
    let piece = shape.piece();
    let mut qkv = Buffer::stale(rows * 3 * d);
    (shape.pieces(&mut qkv, 3 * d), shape.origins())
        .into_par_iter()
        .for_each_init(
            || Buffer::stale(piece * d),
            |z, (qkv, (image, first))| {
                let rows = qkv.len() / (3 * d);
                let z = &mut z[..rows * d];
                let x = &x[(image * n + first) * d..][..rows * d];
                norm::forward(z, x, weights.norm1, shape.eps);
                product(qkv, Start::Bias(weights.qkv[1]), z, &matrices.qkv, 1.0);
            },
        );
    qkv
}

/// Runs the block on `x` `[B T, D]`; with `cls_attention` `[B, h, T - 1]`, the first token's attention to the others
/// goes there; `save` keeps what [`backward`] needs.
pub(crate) fn forward(
    shape: Shape<'_>,
    weights: Weights<'_>,
    matrices: &Matrices,
    x: &[f32],
    cls_attention: Option<&mut [f32]>,
    save: bool,
) -> (Vec<f32>, Option<Saved>) {
    let (n, d, rows) = (shape.tokens, shape.width, shape.rows());
    let qkv = queries_keys_values(&shape, &weights, matrices, x);
    let mut out = vec![0f32; rows * d];
    // Without a backward pass these live in each task's scratch memory.
    let kept = |columns: usize| Buffer::stale(if save { rows * columns } else { 0 });
    let (mut attended, mut middle, mut hidden) = (kept(d), kept(d), kept(shape.hidden));
    let optional = |buffer, columns| -> Vec<Option<&mut [f32]>> {
        if save {
            shape
                .pieces(buffer, columns)
                .into_iter()
                .map(Some)
                .collect()
        } else {
            shape.origins().iter().map(|_| None).collect()
        }
    };
    let origins = shape.origins();
    let mut images = cls_attention.map(|a| a.chunks_mut(shape.heads * (n - 1).max(1)));
    let cls_attention: Vec<Option<&mut [f32]>> = origins
        .iter()
        .map(|&(_, first)| {
            if first == 0 {
                images.as_mut()?.next()
            } else {
                None
            }
        })
        .collect();
    (
        shape.pieces(&mut out, d),
        origins,
        optional(&mut attended, d),
        optional(&mut middle, d),
        optional(&mut hidden, shape.hidden),
        cls_attention,
    )
        .into_par_iter()
        .for_each_init(
            || Scratch::new(&shape, save),
            |scratch, (out, (image, first), attended, middle, hidden, cls)| {
                let rows = out.len() / d;
                let x = &x[(image * n + first) * d..][..rows * d];
                let packed = &qkv[image * n * 3 * d..][..n * 3 * d];
                let attended = attended.unwrap_or(&mut scratch.attended[..]);
                let attended = &mut attended[..rows * d];
                let p = &mut scratch.probabilities[..rows * n];
                shape.heads().attend(attended, packed, first, p, cls);
                let middle = middle.unwrap_or(&mut scratch.middle[..]);
                let middle = &mut middle[..rows * d];
                residual(
                    middle,
                    x,
                    attended,
                    &matrices.projection,
                    weights.projection[1],
                    shape.factor(0, image),
                );
                let z = &mut scratch.normed[..rows * d];
                norm::forward(z, middle, weights.norm2, shape.eps);
                let activated = &mut scratch.activated[..rows * shape.hidden];
                if let Some(hidden) = hidden {
                    product(hidden, Start::Bias(weights.fc1[1]), z, &matrices.fc1, 1.0);
                    vectorised!(|| {
                        let pairs = activated.iter_mut().zip(&*hidden);
                        pairs.for_each(|(a, &h)| *a = math::gelu(h));
                    });
                } else {
                    product(
                        activated,
                        Start::Bias(weights.fc1[1]),
                        z,
                        &matrices.fc1,
                        1.0,
                    );
                    vectorised!(|| activated.iter_mut().for_each(|a| *a = math::gelu(*a)));
                }
                let factor = shape.factor(1, image);
                residual(
                    out,
                    middle,
                    activated,
                    &matrices.fc2,
                    weights.fc2[1],
                    factor,
                );
            },
        );
    let saved = save.then_some(Saved {
        qkv,
        attended,
        middle,
        hidden,
    });
    (out, saved)
}

/// A task's memory, used again for each of its pieces.
struct Scratch {
    probabilities: Buffer,
    normed: Buffer,
    activated: Buffer,
    attended: Buffer,
    middle: Buffer,
}

impl Scratch {
    fn new(shape: &Shape<'_>, save: bool) -> Self {
        let rows = shape.piece();
        let unsaved = if save { 0 } else { rows * shape.width };
        Self {
            probabilities: Buffer::stale(rows * shape.tokens),
            normed: Buffer::stale(rows * shape.width),
            activated: Buffer::stale(rows * shape.hidden),
            attended: Buffer::stale(unsaved),
            middle: Buffer::stale(unsaved),
        }
    }
}

/// Gradients with respect to the block's input, and its parameters where `with_parameters`; `g`: `[B T, D]`.
pub(crate) fn backward(
    shape: Shape<'_>,
    weights: Weights<'_>,
    x: &[f32],
    saved: &Saved,
    g: &[f32],
    with_parameters: bool,
) -> (Vec<f32>, Option<Gradients>) {
    let (n, d, h, rows) = (shape.tokens, shape.width, shape.hidden, shape.rows());
    let matrices = Matrices::backward(&weights);
    let mut dx = vec![0f32; rows * d];
    let buffer = |columns: usize| Buffer::stale(rows * columns);
    // Inputs of the four products and gradients of their outputs, whole, for the weights' gradients.
    let (mut z1, mut dqkv, mut g1) = (buffer(d), buffer(3 * d), buffer(d));
    let (mut z2, mut dhidden, mut activated) = (buffer(d), buffer(h), buffer(h));
    let scaled = shape.factors.map(|[_, factors]| {
        let mut scaled = buffer(d);
        let images = scaled.chunks_mut(n * d).zip(g.chunks(n * d));
        for ((scaled, g), factor) in images.zip(factors) {
            let pairs = scaled.iter_mut().zip(g);
            pairs.for_each(|(scaled, g)| *scaled = factor * g);
        }
        scaled
    });
    let g2 = scaled.as_deref().unwrap_or(g);
    let mut norms = vec![0f32; shape.images * 4 * d];
    (
        dx.par_chunks_mut(n * d),
        z1.par_chunks_mut(n * d),
        dqkv.par_chunks_mut(n * 3 * d),
        g1.par_chunks_mut(n * d),
        z2.par_chunks_mut(n * d),
        dhidden.par_chunks_mut(n * h),
        activated.par_chunks_mut(n * h),
        norms.par_chunks_mut(4 * d),
    )
        .into_par_iter()
        .enumerate()
        .for_each_init(
            || [n * n, n * n, n * d].map(Buffer::stale),
            |[p, dp, dz], (image, (dx, z1, dqkv, g1, z2, dhidden, activated, norms))| {
                let of =
                    |rows| -> std::ops::Range<usize> { image * n * rows..(image + 1) * n * rows };
                let (norm1, norm2) = norms.split_at_mut(2 * d);
                // MLP.
                product(dhidden, Start::Zero, &g2[of(d)], &matrices.fc2, 1.0);
                vectorised!(|| {
                    let hidden = &saved.hidden[of(h)];
                    for ((dh, a), &x) in dhidden.iter_mut().zip(activated).zip(hidden) {
                        let (value, derivative) = math::gelu_and_derivative(x);
                        *a = value;
                        *dh *= derivative;
                    }
                });
                product(dz, Start::Zero, dhidden, &matrices.fc1, 1.0);
                dx.copy_from_slice(&g[of(d)]);
                let middle = &saved.middle[of(d)];
                norm::backward(dx, z2, norm2, middle, dz, weights.norm2, shape.eps);
                // Attention; dx now holds the gradient of the MLP branch's input.
                let factor = shape.factor(0, image);
                g1.iter_mut()
                    .zip(&*dx)
                    .for_each(|(g, &dx)| *g = factor * dx);
                product(dz, Start::Zero, g1, &matrices.projection, 1.0);
                let packed = &saved.qkv[of(3 * d)];
                shape.heads().backward(dqkv, packed, dz, p, dp);
                product(dz, Start::Zero, dqkv, &matrices.qkv, 1.0);
                norm::backward(dx, z1, norm1, &x[of(d)], dz, weights.norm1, shape.eps);
            },
        );
    if !with_parameters {
        return (dx, None);
    }
    let maps = [
        Products(&dqkv, 3 * d, &z1, d),
        Products(&g1, d, &saved.attended, d),
        Products(&dhidden, h, &z2, d),
        Products(g2, d, &activated, h),
    ];
    (dx, Some(parameter_gradients(&norms, maps, rows)))
}

/// What the gradient of an affine map's parameters is made of: the gradient of its output `[rows, outputs]` and its input
/// `[rows, inputs]`, each with its columns.
#[derive(Clone, Copy)]
struct Products<'a>(&'a [f32], usize, &'a [f32], usize);

/// From the sums of both norms, `[B, 4 D]`, and the four maps, in the order that they are used.
fn parameter_gradients(norms: &[f32], maps: [Products<'_>; 4], rows: usize) -> Gradients {
    let d = maps[0].3;
    let sums = column_sums(norms, 4 * d);
    let part = |i: usize| sums[i * d..(i + 1) * d].to_vec();
    let [qkv, projection, fc1, fc2] = weight_gradients(maps, rows);
    let bias = |i: usize| column_sums(maps[i].0, maps[i].1);
    [
        part(0),
        part(1),
        qkv,
        bias(0),
        projection,
        bias(1),
        part(2),
        part(3),
        fc1,
        bias(2),
        fc2,
        bias(3),
    ]
}

/// `G^T X` of each map, from G `[rows, outputs]` and X `[rows, inputs]`.
fn weight_gradients(maps: [Products<'_>; 4], rows: usize) -> [Vec<f32>; 4] {
    let gradient = |Products(g, outputs, x, inputs): Products<'_>| {
        let g = Packed::tiles(g, rows, outputs);
        transposed_product(&g, &Packed::new(x, rows, inputs))
    };
    let [qkv, projection, fc1, fc2] = maps;
    let pair = |a, b| rayon::join(|| gradient(a), || gradient(b));
    let ((qkv, projection), (fc1, fc2)) = rayon::join(|| pair(qkv, projection), || pair(fc1, fc2));
    [qkv, projection, fc1, fc2]
}
