//! The backward pass, written by hand.

use rayon::prelude::*;

use super::super::microkernel::{Accumulate, Target};
use super::super::pack::Packed;
use super::super::panel_layout::{Rows, Stack, column_sums, fill, split};
use super::super::pool::Buffer;
use super::super::product::product;
use super::super::weight_gradient::weight_gradient;
use super::super::{math, norm};
use super::{Gradients, Matrices, Saved, Shape, Weights};
use crate::vectorised;

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
                    Buffer::recycled(n * d),
                    Buffer::recycled(merged.values(n)),
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
    product(
        Target::Panels(blocks),
        Accumulate::Replace,
        x,
        matrix.panels(),
        1.0,
    );
}

/// `out = x M`, row-major.
fn into_rows(out: &mut [f32], x: &Rows<'_>, matrix: &Packed) {
    product(
        Target::RowMajor(out),
        Accumulate::Replace,
        x,
        matrix.panels(),
        1.0,
    );
}

/// Lengths of what a block's vectors' gradients are, in the order that they have in [`Gradients`]; a norm's two are one.
#[derive(Clone, Copy)]
pub(super) struct VectorLengths {
    pub(super) width: usize,
    pub(super) hidden: usize,
}

impl VectorLengths {
    fn lengths(self) -> [usize; 6] {
        let (d, hidden) = (self.width, self.hidden);
        [2 * d, 3 * d, d, 2 * d, hidden, d]
    }

    pub(super) fn len(self) -> usize {
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
pub(super) fn parameter_gradients(
    sums: &[f32],
    vectors: VectorLengths,
    maps: &[[Stack<'_>; 2]; 4],
) -> Gradients {
    let mut sums = crate::column_sums(sums, vectors.len());
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
