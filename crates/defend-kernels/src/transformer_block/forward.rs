//! The forward pass.

use rayon::prelude::*;

use super::super::microkernel::{Accumulate, Target};
use super::super::pack::Packed;
use super::super::panel_layout::{PanelLayout, Rows, split, split_pieces};
use super::super::pool::Buffer;
use super::super::product::product;
use super::super::{attention, math, norm};
use super::{Matrices, Saved, Shape, Weights};
use crate::vectorised;

/// `out = x + factor (y W^T + b)`, row-major but for `y`.
fn residual(out: &mut [f32], x: &[f32], y: &Rows<'_>, weight: &Packed, bias: &[f32], factor: f32) {
    add_bias(out, x, bias, factor);
    if factor != 0.0 {
        product(
            Target::RowMajor(out),
            Accumulate::Add,
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
            || Buffer::recycled(whole.values(piece)),
            |z, (mut qkv, (image, first))| {
                let rows = piece.min(n - first);
                let z = &mut z[..whole.values(rows)];
                let x = &x[(image * n + first) * d..][..rows * d];
                norm::forward_blocks(&mut split(z, rows), x, weights.norm1, shape.eps);
                product(
                    Target::Panels(&mut qkv),
                    Accumulate::Bias(weights.qkv[1]),
                    &Rows::all(z, rows, whole),
                    matrices.qkv.panels(),
                    1.0,
                );
            },
        );
    qkv
}

/// Runs the block on `x` `[B T, D]`; with `cls_attention` `[B, h, T - 1]`, the first token's attention to the others
/// goes there; `save` keeps what [`super::backward`] needs.
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
    let kept = |len: usize| Buffer::recycled(if save { len } else { 0 });
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
        let start = Accumulate::Bias(&bias[first..first + columns.count]);
        match &mut hidden {
            None => {
                product(Target::Panels(activated), start, z, fc1, 1.0);
                vectorised!(|| {
                    for block in activated.iter_mut() {
                        block.iter_mut().for_each(|a| *a = math::gelu(*a));
                    }
                });
            }
            Some(hidden) => {
                let hidden = &mut hidden[part.clone()];
                product(Target::Panels(hidden), start, z, fc1, 1.0);
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
                Accumulate::Add,
                &activated,
                fc2.of_depth(part),
                factor,
            );
        }
    }
}

/// A task's memory, used again for each of its pieces.
struct Scratch {
    attention: attention::Scratch,
    normed: Buffer,
    activated: Buffer,
    attended: Buffer,
    middle: Buffer,
}

impl Scratch {
    fn new(shape: &Shape<'_>, save: bool) -> Self {
        let rows = shape.piece();
        let unsaved = |len: usize| Buffer::recycled(if save { 0 } else { len });
        let part = PanelLayout::whole(shape.hidden.min(HIDDEN_AT_A_TIME));
        Self {
            attention: shape.heads().scratch(rows, false),
            normed: Buffer::recycled(shape.whole().values(rows)),
            activated: Buffer::recycled(part.values(rows)),
            attended: unsaved(shape.heads().output_columns().values(rows)),
            middle: unsaved(rows * shape.width),
        }
    }
}
