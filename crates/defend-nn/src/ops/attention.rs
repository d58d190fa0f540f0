//! Multi-head self-attention on a packed query-key-value tensor.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{from_vec, is_fast, slice, with_slices};
use defend_kernels::attention::Heads;
use defend_kernels::panel_layout::{fill, fill_pieces, read, split};
use defend_kernels::pool::Buffer;

/// Queries a parallel task handles: fixed, so that a result does not depend on batch or threads.
const QUERIES_PER_TASK: usize = 128;

/// Multi-head self-attention: `softmax(Q K^T / sqrt(d)) V` for every head, heads side by side.
///
/// `qkv`: `[B, N, 3 D]`, timm's layout (query, key, value, each split into `heads` of `d = D / heads`
/// channels); returns `[B, N, D]`. Differentiable. The `[B, h, N, N]` probabilities are never stored: the
/// backward pass computes them again.
///
/// # Errors
/// When the last dimension is not divisible by three times `heads`.
pub fn attention(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, n, width) = qkv.dims3()?;
    if heads == 0 || width % (3 * heads) != 0 {
        bail!("attention: {width} channels are not three times a multiple of {heads} heads")
    }
    let d = width / 3 / heads;
    if qkv.elem_count() == 0 {
        return qkv.narrow(2, 0, heads * d);
    }
    if is_fast(&[qkv]) {
        return qkv.contiguous()?.apply_op1(Attention { heads, d });
    }
    let split = qkv.reshape((b, n, 3, heads, d))?.permute((2, 0, 3, 1, 4))?;
    let part = |i| split.get(i)?.contiguous();
    let (q, k, v) = (part(0)?, part(1)?, part(2)?);
    let logits = (q.matmul(&k.t()?)? * scale(d))?;
    let probabilities = candle_nn::ops::softmax(&logits, D::Minus1)?;
    let out = probabilities.matmul(&v)?;
    out.transpose(1, 2)?.reshape((b, n, heads * d))
}

/// Attention of the first (CLS) token to all others, per head: eq. 2's ATTN before the mean over heads.
///
/// `qkv`: `[B, 1 + N, 3 D]`; returns `[B, heads, N]`: `softmax(q_cls K^T / sqrt(d))` with the CLS->CLS
/// column left out, so rows sum to less than one.
///
/// # Errors
/// As [`attention`].
pub fn cls_attention(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, n, width) = qkv.dims3()?;
    if heads == 0 || width % (3 * heads) != 0 || n == 0 {
        bail!(
            "CLS attention: shape {:?} does not fit {heads} heads",
            qkv.dims()
        )
    }
    let dim = width / 3;
    let d = dim / heads;
    let split = |t: Tensor, rows: usize| {
        t.reshape((b, rows, heads, d))?
            .transpose(1, 2)?
            .contiguous()
    };
    let query = split(qkv.narrow(1, 0, 1)?.narrow(2, 0, dim)?.contiguous()?, 1)?;
    let keys = split(qkv.narrow(2, dim, dim)?.contiguous()?, n)?;
    let logits = (query.matmul(&keys.t()?)? * scale(d))?;
    let probabilities = candle_nn::ops::softmax(&logits, D::Minus1)?;
    probabilities.squeeze(2)?.narrow(2, 1, n - 1)?.contiguous()
}

fn scale(d: usize) -> f64 {
    1.0 / (d as f64).sqrt()
}

struct Attention {
    heads: usize,
    d: usize,
}

impl Attention {
    fn width(&self) -> usize {
        self.heads * self.d
    }

    /// For an image of `tokens`.
    fn of(&self, tokens: usize) -> Heads {
        Heads {
            tokens,
            width: self.width(),
            count: self.heads,
        }
    }
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, n, _) = layout.shape().dims3()?;
        let width = self.width();
        let qkv = slice("attention", qkv, layout)?;
        let mut out = vec![0f32; b * n * width];
        let heads = self.of(n);
        let (image, merged) = (heads.qkv_columns().values(n), heads.output_columns());
        let blocks = fill_pieces(qkv, heads.qkv_columns(), n);
        let tasks: Vec<_> = out
            .chunks_mut(n * width)
            .zip(blocks.chunks(image))
            .flat_map(|(out, image)| {
                out.chunks_mut(QUERIES_PER_TASK * width)
                    .enumerate()
                    .map(move |(i, out)| (image, i * QUERIES_PER_TASK, out))
            })
            .collect();
        let most = QUERIES_PER_TASK.min(n);
        tasks.into_par_iter().for_each_init(
            || {
                (
                    heads.scratch(most, false),
                    Buffer::recycled(merged.values(most)),
                )
            },
            |(scratch, attended), (image, first, out)| {
                let queries = out.len() / width;
                let attended = &mut attended[..merged.values(queries)];
                let target = &mut split(attended, queries)[..];
                heads.attend(target, image, (first, queries), scratch, None);
                read(out, attended, merged);
            },
        );
        Ok((CpuStorage::F32(out), (b, n, width).into()))
    }

    fn bwd(&self, qkv: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (_, n, packed) = qkv.dims3()?;
        let width = self.width();
        with_slices("attention", [qkv, grad], |[xs, gs]| {
            let mut dx = vec![0f32; xs.len()];
            let heads = self.of(n);
            let columns = heads.qkv_columns();
            let images = dx
                .par_chunks_mut(n * packed)
                .zip(xs.par_chunks(n * packed))
                .zip(gs.par_chunks(n * width));
            images.for_each_init(
                || {
                    let [dqkv, qkv] = [(); 2].map(|()| Buffer::recycled(columns.values(n)));
                    let g = Buffer::recycled(heads.output_columns().values(n));
                    (heads.scratch(n, true), dqkv, qkv, g)
                },
                |(scratch, dqkv, qkv, blocks), ((dx, x), g)| {
                    fill(qkv, x, columns, 1.0);
                    fill(blocks, g, heads.output_columns(), 1.0);
                    heads.backward(dqkv, qkv, blocks, scratch);
                    read(dx, dqkv, columns);
                },
            );
            from_vec(dx, qkv.dims()).map(Some)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradients, distance, noise};
    use super::*;

    #[test]
    fn gradients_match_finite_differences() {
        check_gradients(&[noise(&[2, 9, 3 * 24], 1)], |t| attention(&t[0], 3));
        check_gradients(&[noise(&[2, 9, 3 * 24], 1)], |t| cls_attention(&t[0], 3));
    }

    #[test]
    fn no_image_has_an_empty_result() -> Result<()> {
        assert_eq!(attention(&noise(&[0, 5, 48], 1), 2)?.dims(), [0, 5, 16]);
        Ok(())
    }

    #[test]
    fn many_tokens_are_split_and_joined() -> Result<()> {
        let qkv = noise(&[2, 300, 3 * 16], 5);
        let composed = attention(&qkv.to_dtype(candle_core::DType::F64)?, 2)?;
        assert!(distance(&attention(&qkv, 2)?, &composed) < 1e-5);
        Ok(())
    }

    /// Heads of one block of the kernel and a part of another, queries in several.
    #[test]
    fn heads_of_any_width_match_the_composition_in_double_precision() -> Result<()> {
        let gradient = |dtype| -> Result<[Tensor; 2]> {
            let qkv = noise(&[2, 150, 3 * 80], 5).to_dtype(dtype)?;
            let qkv = candle_core::Var::from_tensor(&qkv)?;
            let out = attention(&qkv, 2)?;
            let loss = (&out * noise(out.dims(), 6).to_dtype(dtype)?)?.sum_all()?;
            Ok([out, loss.backward()?.get(&qkv).unwrap().clone()])
        };
        let single = gradient(candle_core::DType::F32)?;
        let double = gradient(candle_core::DType::F64)?;
        for (single, double) in single.iter().zip(&double) {
            assert!(distance(single, double) < 1e-5);
        }
        Ok(())
    }

    #[test]
    fn an_image_does_not_depend_on_its_batch() -> Result<()> {
        let qkv = noise(&[5, 150, 3 * 16], 5);
        let whole = attention(&qkv, 2)?;
        let alone = attention(&qkv.narrow(0, 3, 1)?, 2)?;
        assert_eq!(distance(&alone, &whole.narrow(0, 3, 1)?), 0.0);
        Ok(())
    }

    #[test]
    fn heads_that_do_not_divide_the_width_are_refused() {
        assert!(attention(&noise(&[1, 4, 30], 0), 4).is_err());
    }
}
