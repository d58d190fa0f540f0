//! A whole pre-norm transformer block on slices: forward, and the backward pass written by hand.
//!
//! Activations between products are in [`super::blocked`] layout, the block's input, output and residual sums row-major.
//! Work is cut into pieces of one image's rows, so that everything between two products stays in the cache, and a row's
//! result depends neither on the batch nor on the number of threads.

use rayon::prelude::*;

use super::attention::Heads;
use super::blocked::{Columns, Rows, Stack, column_sums, fill, split, split_pieces};
use super::math;
use super::norm;
use super::packed::{Packed, Start, Target, product, weight_gradient};
use super::pool::Buffer;
use crate::vectorised;

pub mod timed;

/// Rows of an image that a task handles at most: what lies between two products stays in the second cache, and few queries are left
/// for blocks that they do not fill.
const ROWS_PER_PIECE: usize = 384;
/// Rows of an image that a task handles at least, where there are threads for more tasks: two of the highest tiles.
const LEAST_ROWS_PER_PIECE: usize = 24;
/// Work that each piece of an image does again, mostly laying out the keys, as a part of the image's own.
const COST_OF_A_PIECE: f64 = 0.02;

/// Weights of a block: matrices `[O, I]` row-major, vectors `[O]`.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    /// Scale and shift of the first LayerNorm, `[D]` each.
    pub norm1: [&'a [f32]; 2],
    /// Queries, keys and values: `[3 D, D]` and `[3 D]`.
    pub qkv: [&'a [f32]; 2],
    /// Output of the attention: `[D, D]` and `[D]`.
    pub projection: [&'a [f32]; 2],
    /// Scale and shift of the second LayerNorm, `[D]` each.
    pub norm2: [&'a [f32]; 2],
    /// First layer of the MLP: `[hidden, D]` and `[hidden]`.
    pub fc1: [&'a [f32]; 2],
    /// Second layer of the MLP: `[D, hidden]` and `[D]`.
    pub fc2: [&'a [f32]; 2],
}

/// The four matrices of a block in panels, and the biases at the end of both branches: where LayerScale is part of the weights,
/// these are other than the block's own.
#[derive(Debug)]
pub struct Matrices {
    qkv: Packed,
    projection: Packed,
    fc1: Packed,
    fc2: Packed,
    biases: [Vec<f32>; 2],
}

impl Matrices {
    /// For [`forward`]: `W^T`.
    pub fn forward(weights: &Weights<'_>, heads: usize) -> Self {
        Self::new(weights, heads, |matrix, inputs, outputs| {
            Packed::transposed(matrix, inputs, outputs)
        })
    }

    /// For the gradients of the maps' inputs: `W`.
    fn backward(weights: &Weights<'_>, heads: usize) -> Self {
        Self::new(weights, heads, |matrix, inputs, outputs| {
            Packed::new(matrix, outputs, inputs)
        })
    }

    /// The same, and what they will be multiplied with, rounded to `bf16`.
    pub fn rounded(self) -> Self {
        self.map(Packed::rounded)
    }

    /// For more than one pass.
    pub fn kept(self) -> Self {
        self.map(Packed::kept)
    }

    fn map(self, f: impl Fn(Packed) -> Packed) -> Self {
        Self {
            qkv: f(self.qkv),
            projection: f(self.projection),
            fc1: f(self.fc1),
            fc2: f(self.fc2),
            biases: self.biases,
        }
    }

    /// From each matrix and the columns of its map's input and output.
    fn new(
        weights: &Weights<'_>,
        heads: usize,
        pack: impl Fn(&[f32], Columns, Columns) -> Packed,
    ) -> Self {
        let (d, hidden) = (weights.projection[1].len(), weights.fc1[1].len());
        let (whole, by_head) = (Columns::whole(d), Columns::grouped(d, heads));
        let hidden = Columns::whole(hidden);
        Self {
            qkv: pack(weights.qkv[0], whole, Columns::grouped(3 * d, 3 * heads)),
            projection: pack(weights.projection[0], by_head, whole),
            fc1: pack(weights.fc1[0], whole, hidden),
            fc2: pack(weights.fc2[0], hidden, whole),
            biases: [weights.projection[1], weights.fc2[1]].map(<[f32]>::to_vec),
        }
    }
}

/// Extents of a block's input and what is constant in a call.
#[derive(Clone, Copy)]
pub struct Shape<'a> {
    /// Images, B.
    pub images: usize,
    /// Tokens of an image, T.
    pub tokens: usize,
    /// Channels, D.
    pub width: usize,
    /// Hidden channels of the MLP.
    pub hidden: usize,
    /// Heads of the attention; divides D.
    pub heads: usize,
    /// Added to the variance of both LayerNorms.
    pub eps: f32,
    /// Factors of both residual branches for each image; one without.
    pub factors: Option<[&'a [f32]; 2]>,
    /// Threads that have nothing but these images to do.
    pub threads: usize,
}

/// Activations that the backward pass needs, image by image.
pub struct Saved {
    /// Queries, keys and values, in blocks.
    qkv: Buffer,
    /// Output of the attention before its projection, in blocks.
    attended: Buffer,
    /// Input of the MLP's branch, row-major.
    middle: Buffer,
    /// The MLP's hidden values before GELU, in blocks.
    hidden: Buffer,
}

/// Gradients of a block's parameters, in the order of [`Weights`]: matrix, then vector.
pub type Gradients = [Vec<f32>; 12];

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

    /// Rows of a piece: an image cut evenly, into more pieces where a few images would leave threads idle.
    fn piece(&self) -> usize {
        let fewest = self.tokens.div_ceil(ROWS_PER_PIECE);
        let most = (self.tokens / LEAST_ROWS_PER_PIECE).max(fewest);
        let time = |pieces: usize| {
            let turns = (self.images * pieces).div_ceil(self.threads);
            turns as f64 * (1.0 / pieces as f64 + COST_OF_A_PIECE)
        };
        let best = (fewest..=most).min_by(|&a, &b| time(a).total_cmp(&time(b)));
        self.tokens.div_ceil(best.unwrap_or(fewest))
    }

    /// Row-major rows `[B T, columns]` cut into pieces, image by image.
    fn pieces<'a>(&self, rows: &'a mut [f32], columns: usize) -> Vec<&'a mut [f32]> {
        let piece = self.piece() * columns;
        let images = rows.chunks_mut(self.tokens * columns);
        images.flat_map(|image| image.chunks_mut(piece)).collect()
    }

    /// A matrix of all images in blocks, whose columns are cut so.
    fn buffer(&self, columns: Columns) -> Buffer {
        Buffer::stale(self.images * columns.values(self.tokens))
    }

    /// An image's part of such a matrix.
    fn image<'a>(&self, values: &'a [f32], columns: Columns, image: usize) -> &'a [f32] {
        let len = columns.values(self.tokens);
        &values[image * len..][..len]
    }

    /// The whole matrix, for a product over its rows.
    fn stack<'a>(&self, values: &'a [f32], columns: Columns) -> Stack<'a> {
        Stack {
            values,
            rows: self.rows(),
            piece: self.tokens,
            columns,
        }
    }

    fn whole(&self) -> Columns {
        Columns::whole(self.width)
    }

    fn inner(&self) -> Columns {
        Columns::whole(self.hidden)
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

/// `out = x + factor (y W^T + b)`, row-major but for `y`.
fn residual(out: &mut [f32], x: &[f32], y: &Rows<'_>, weight: &Packed, bias: &[f32], factor: f32) {
    add_bias(out, x, bias, factor);
    if factor != 0.0 {
        product(
            Target::RowMajor(out),
            Start::Kept,
            y,
            weight.panels(),
            factor,
        );
    }
}

/// `out = x + factor b`, row by row.
fn add_bias(out: &mut [f32], x: &[f32], bias: &[f32], factor: f32) {
    let outputs = bias.len();
    vectorised!(|| {
        for (out, x) in out.chunks_exact_mut(outputs).zip(x.chunks_exact(outputs)) {
            for ((o, &x), &b) in out.iter_mut().zip(x).zip(bias) {
                *o = x + factor * b;
            }
        }
    });
}

/// Queries, keys and values of all images in blocks.
fn queries_keys_values(
    shape: &Shape<'_>,
    weights: &Weights<'_>,
    matrices: &Matrices,
    x: &[f32],
) -> Buffer {
    let (n, d) = (shape.tokens, shape.width);
    let (piece, whole) = (shape.piece(), shape.whole());
    let packed = shape.heads().qkv_columns();
    let mut qkv = shape.buffer(packed);
    (split_pieces(&mut qkv, packed, n, piece), shape.origins())
        .into_par_iter()
        .for_each_init(
            || Buffer::stale(whole.values(piece)),
            |z, (mut qkv, (image, first))| {
                let rows = piece.min(n - first);
                let z = &mut z[..whole.values(rows)];
                let x = &x[(image * n + first) * d..][..rows * d];
                norm::forward_blocks(&mut split(z, rows), x, weights.norm1, shape.eps);
                product(
                    Target::Blocks(&mut qkv),
                    Start::Bias(weights.qkv[1]),
                    &Rows::all(z, rows, whole),
                    matrices.qkv.panels(),
                    1.0,
                );
            },
        );
    qkv
}

/// Runs the block on `x` `[B T, D]`; with `cls_attention` `[B, h, T - 1]`, the first token's attention to the others
/// goes there; `save` keeps what [`backward`] needs.
pub fn forward(
    shape: Shape<'_>,
    weights: Weights<'_>,
    matrices: &Matrices,
    x: &[f32],
    cls_attention: Option<&mut [f32]>,
    save: bool,
) -> (Vec<f32>, Option<Saved>) {
    let (n, d, piece) = (shape.tokens, shape.width, shape.piece());
    let (whole, inner, merged) = (shape.whole(), shape.inner(), shape.heads().output_columns());
    let qkv = queries_keys_values(&shape, &weights, matrices, x);
    let mut out = vec![0f32; shape.rows() * d];
    let origins = shape.origins();
    // Without a backward pass these live in each task's scratch memory.
    let kept = |len: usize| Buffer::stale(if save { len } else { 0 });
    let mut attended = kept(shape.images * merged.values(n));
    let mut middle = kept(shape.rows() * d);
    let mut hidden = kept(shape.images * inner.values(n));
    let [attended_pieces, hidden_pieces] = [(&mut attended, merged), (&mut hidden, inner)]
        .map(|(buffer, columns)| or_none(split_pieces(buffer, columns, n, piece), &origins));
    let middle_pieces = or_none(shape.pieces(&mut middle, d), &origins);
    let cls_attention = first_rows(&shape, cls_attention, &origins);
    (
        shape.pieces(&mut out, d),
        origins,
        attended_pieces,
        middle_pieces,
        hidden_pieces,
        cls_attention,
    )
        .into_par_iter()
        .for_each_init(
            || Scratch::new(&shape, save),
            |scratch, (out, (image, first), attended, middle, hidden, cls)| {
                let rows = out.len() / d;
                let x = &x[(image * n + first) * d..][..rows * d];
                let packed = shape.image(&qkv, shape.heads().qkv_columns(), image);
                let z = &mut scratch.normed[..whole.values(rows)];
                let mut attended = attended
                    .unwrap_or_else(|| split(&mut scratch.attended[..merged.values(rows)], rows));
                shape.heads().attend(
                    &mut attended,
                    packed,
                    (first, rows),
                    &mut scratch.attention,
                    cls,
                );
                let middle = middle.unwrap_or(&mut scratch.middle[..]);
                let middle = &mut middle[..rows * d];
                residual(
                    middle,
                    x,
                    &Rows::new(&attended, rows, merged),
                    &matrices.projection,
                    &matrices.biases[0],
                    shape.factor(0, image),
                );
                norm::forward_blocks(&mut split(z, rows), middle, weights.norm2, shape.eps);
                mlp(
                    out,
                    middle,
                    &Rows::all(z, rows, whole),
                    (matrices, weights.fc1[1]),
                    (&mut scratch.activated[..], hidden),
                    shape.factor(1, image),
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

/// A buffer's part for each piece; an empty buffer has none.
fn or_none<T>(parts: Vec<T>, origins: &[(usize, usize)]) -> Vec<Option<T>> {
    let mut parts = parts.into_iter();
    origins.iter().map(|_| parts.next()).collect()
}

/// Where the first token's attention of each piece goes: only an image's first piece has that token.
fn first_rows<'a>(
    shape: &Shape<'_>,
    cls_attention: Option<&'a mut [f32]>,
    origins: &[(usize, usize)],
) -> Vec<Option<&'a mut [f32]>> {
    let len = shape.heads * (shape.tokens - 1).max(1);
    let mut images = cls_attention.map(|attention| attention.chunks_mut(len));
    let rows = origins.iter().map(|(_, first)| match (first, &mut images) {
        (0, Some(images)) => images.next(),
        _ => None,
    });
    rows.collect()
}

/// Hidden channels of the MLP that are computed at a time: between its two products they stay in the cache.
const HIDDEN_AT_A_TIME: usize = 384;

/// `out = x + factor (GELU(z W1^T + b1) W2^T + b2)`; `out` and `x` are row-major `[rows, D]`, `z` is `[rows, D]` in blocks.
/// `activated` has room for a part of the hidden values, `[rows, 384]` in blocks; with `hidden`, blocks of `[rows, H]`, GELU's
/// argument goes there.
fn mlp(
    out: &mut [f32],
    x: &[f32],
    z: &Rows<'_>,
    (matrices, bias): (&Matrices, &[f32]),
    (activated, mut hidden): (&mut [f32], Option<Vec<&mut [f32]>>),
    factor: f32,
) {
    let rows = z.count;
    add_bias(out, x, &matrices.biases[1], factor);
    if factor == 0.0 && hidden.is_none() {
        return;
    }
    let (fc1, fc2) = (matrices.fc1.panels(), matrices.fc2.panels());
    let inner = fc1.columns;
    let blocks = inner.blocks();
    let step = HIDDEN_AT_A_TIME.div_ceil(inner.width);
    for from in (0..blocks).step_by(step) {
        let part = from..(from + step).min(blocks);
        let fc1 = fc1.of_columns(part.clone());
        let (first, columns) = (inner.block(from).0, fc1.columns);
        let activated = &mut split(&mut activated[..columns.values(rows)], rows)[..];
        let start = Start::Bias(&bias[first..first + columns.count]);
        match &mut hidden {
            None => {
                product(Target::Blocks(activated), start, z, fc1, 1.0);
                vectorised!(|| {
                    for block in activated.iter_mut() {
                        block.iter_mut().for_each(|a| *a = math::gelu(*a));
                    }
                });
            }
            Some(hidden) => {
                let hidden = &mut hidden[part.clone()];
                product(Target::Blocks(hidden), start, z, fc1, 1.0);
                vectorised!(|| {
                    for (activated, hidden) in activated.iter_mut().zip(hidden.iter()) {
                        let pairs = activated.iter_mut().zip(&**hidden);
                        pairs.for_each(|(a, &h)| *a = math::gelu(h));
                    }
                });
            }
        }
        if factor != 0.0 {
            let activated = Rows::new(activated, rows, columns);
            product(
                Target::RowMajor(out),
                Start::Kept,
                &activated,
                fc2.of_depth(part),
                factor,
            );
        }
    }
}

/// A task's memory, used again for each of its pieces.
struct Scratch {
    attention: super::attention::Scratch,
    normed: Buffer,
    activated: Buffer,
    attended: Buffer,
    middle: Buffer,
}

impl Scratch {
    fn new(shape: &Shape<'_>, save: bool) -> Self {
        let rows = shape.piece();
        let unsaved = |len: usize| Buffer::stale(if save { 0 } else { len });
        let part = Columns::whole(shape.hidden.min(HIDDEN_AT_A_TIME));
        Self {
            attention: shape.heads().scratch(rows, false),
            normed: Buffer::stale(shape.whole().values(rows)),
            activated: Buffer::stale(part.values(rows)),
            attended: unsaved(shape.heads().output_columns().values(rows)),
            middle: unsaved(rows * shape.width),
        }
    }
}

/// Gradients with respect to the block's input, and its parameters where `with_parameters`; `g`: `[B T, D]`.
pub fn backward(
    shape: Shape<'_>,
    weights: Weights<'_>,
    x: &[f32],
    saved: &Saved,
    g: &[f32],
    with_parameters: bool,
) -> (Vec<f32>, Option<Gradients>) {
    let (n, d) = (shape.tokens, shape.width);
    let (whole, inner) = (shape.whole(), shape.inner());
    let [packed, merged] = [shape.heads().qkv_columns(), shape.heads().output_columns()];
    let matrices = Matrices::backward(&weights, shape.heads);
    let mut dx = vec![0f32; shape.rows() * d];
    // Inputs of the four products and gradients of their outputs, whole, for the weights' gradients.
    let [mut z1, mut z2, mut g1, mut g2] = [(); 4].map(|()| shape.buffer(whole));
    let [mut dhidden, mut activated] = [(); 2].map(|()| shape.buffer(inner));
    let mut dqkv = shape.buffer(packed);
    // Each image's sums for the vectors' gradients, while what is summed is in the cache.
    let vectors = VectorLengths {
        width: d,
        hidden: shape.hidden,
    };
    let mut sums = vec![0f32; shape.images * vectors.len()];
    let [image_whole, image_inner] = [whole.values(n), inner.values(n)];
    (
        dx.par_chunks_mut(n * d),
        z1.par_chunks_mut(image_whole),
        dqkv.par_chunks_mut(packed.values(n)),
        g1.par_chunks_mut(image_whole),
        z2.par_chunks_mut(image_whole),
        dhidden.par_chunks_mut(image_inner),
        activated.par_chunks_mut(image_inner),
        g2.par_chunks_mut(image_whole),
        sums.par_chunks_mut(vectors.len()),
    )
        .into_par_iter()
        .enumerate()
        .for_each_init(
            || {
                (
                    shape.heads().scratch(n, true),
                    Buffer::stale(n * d),
                    Buffer::stale(merged.values(n)),
                )
            },
            |(scratch, dz, dattended), (image, parts)| {
                let (dx, z1, dqkv, g1, z2, dhidden, activated, g2, sums) = parts;
                let [norm1, sum_qkv, sum_g1, norm2, sum_hidden, sum_g2] = vectors.split(sums);
                let of = |columns: usize| image * n * columns..(image + 1) * n * columns;
                let rows = |values, columns| Rows::all(values, n, columns);
                // MLP.
                fill(g2, &g[of(d)], whole, shape.factor(1, image));
                column_sums(sum_g2, g2, whole);
                into_blocks(dhidden, &rows(g2, whole), &matrices.fc2);
                let hidden = shape.image(&saved.hidden, inner, image);
                vectorised!(|| {
                    for ((dh, a), &x) in dhidden.iter_mut().zip(activated).zip(hidden) {
                        let (value, derivative) = math::gelu_and_derivative(x);
                        *a = value;
                        *dh *= derivative;
                    }
                });
                column_sums(sum_hidden, dhidden, inner);
                into_rows(dz, &rows(dhidden, inner), &matrices.fc1);
                dx.copy_from_slice(&g[of(d)]);
                let middle = &saved.middle[of(d)];
                let [weight, bias] = weights.norm2;
                let z2 = &mut split(z2, n)[..];
                norm::backward(dx, norm2, middle, dz, weight, shape.eps, Some((z2, bias)));
                // Attention; dx now holds the gradient of the MLP branch's input.
                fill(g1, dx, whole, shape.factor(0, image));
                column_sums(sum_g1, g1, whole);
                into_blocks(dattended, &rows(g1, whole), &matrices.projection);
                let qkv = shape.image(&saved.qkv, packed, image);
                shape.heads().backward(dqkv, qkv, dattended, scratch);
                column_sums(sum_qkv, dqkv, packed);
                into_rows(dz, &rows(dqkv, packed), &matrices.qkv);
                let [weight, bias] = weights.norm1;
                let z1 = &mut split(z1, n)[..];
                norm::backward(
                    dx,
                    norm1,
                    &x[of(d)],
                    dz,
                    weight,
                    shape.eps,
                    Some((z1, bias)),
                );
            },
        );
    if !with_parameters {
        return (dx, None);
    }
    let maps = [
        [(&dqkv, packed), (&z1, whole)],
        [(&g1, whole), (&saved.attended, merged)],
        [(&dhidden, inner), (&z2, whole)],
        [(&g2, whole), (&activated, inner)],
    ];
    let maps = maps.map(|sides| sides.map(|(values, columns)| shape.stack(values, columns)));
    (dx, Some(parameter_gradients(&sums, vectors, &maps)))
}

/// `out = x M`, in blocks.
fn into_blocks(out: &mut [f32], x: &Rows<'_>, matrix: &Packed) {
    let blocks = &mut split(out, x.count)[..];
    product(Target::Blocks(blocks), Start::Zero, x, matrix.panels(), 1.0);
}

/// `out = x M`, row-major.
fn into_rows(out: &mut [f32], x: &Rows<'_>, matrix: &Packed) {
    product(Target::RowMajor(out), Start::Zero, x, matrix.panels(), 1.0);
}

/// Lengths of what a block's vectors' gradients are, in the order that they have in [`Gradients`]; a norm's two are one.
#[derive(Clone, Copy)]
struct VectorLengths {
    width: usize,
    hidden: usize,
}

impl VectorLengths {
    fn lengths(self) -> [usize; 6] {
        let (d, hidden) = (self.width, self.hidden);
        [2 * d, 3 * d, d, 2 * d, hidden, d]
    }

    fn len(self) -> usize {
        self.lengths().iter().sum()
    }

    fn split(self, mut all: &mut [f32]) -> [&mut [f32]; 6] {
        debug_assert_eq!(all.len(), self.len());
        self.lengths()
            .map(|len| all.split_off_mut(..len).unwrap_or_default())
    }
}

/// From the sums for the vectors, an image after the other, and the four maps in the order that they are used: the gradient
/// of each one's output, and its input.
fn parameter_gradients(
    sums: &[f32],
    vectors: VectorLengths,
    maps: &[[Stack<'_>; 2]; 4],
) -> Gradients {
    let mut sums = super::column_sums(sums, vectors.len());
    let [norm1, qkv_bias, projection_bias, norm2, fc1_bias, fc2_bias] =
        vectors.split(&mut sums).map(|sums| sums.to_vec());
    let d = vectors.width;
    let gradient = |i: usize| weight_gradient(maps[i][0], maps[i][1]);
    let pair = |i| rayon::join(|| gradient(i), || gradient(i + 1));
    let ((qkv, projection), (fc1, fc2)) = rayon::join(|| pair(0), || pair(2));
    [
        norm1[..d].to_vec(),
        norm1[d..].to_vec(),
        qkv,
        qkv_bias,
        projection,
        projection_bias,
        norm2[..d].to_vec(),
        norm2[d..].to_vec(),
        fc1,
        fc1_bias,
        fc2,
        fc2_bias,
    ]
}
