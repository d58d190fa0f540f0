//! Layer normalisation over the last dimension.

use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{from_vec, is_fast, slice, with_slices};
use crate::kernels::ROWS_PER_TASK;
use crate::kernels::math::{self, vectorised};

/// LayerNorm of the last dimension with a two-pass variance (stable for any mean).
///
/// `x`: `[..., D]`; `weight`, `bias`: `[D]`; `eps` is added to the variance. Differentiable with respect
/// to all three. `bf16` and `f16` inputs are normalised in `f32`.
///
/// # Errors
/// When the shapes do not fit.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    if is_fast(&[x, weight, bias]) {
        let op = LayerNorm {
            eps: eps as f32,
            needs: [x, weight, bias].map(Tensor::track_op),
        };
        return x
            .contiguous()?
            .apply_op3(&weight.contiguous()?, &bias.contiguous()?, op);
    }
    let inner = match x.dtype() {
        DType::F16 | DType::BF16 => DType::F32,
        other => other,
    };
    let wide = x.to_dtype(inner)?;
    let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = centred.broadcast_div(&(variance + eps)?.sqrt()?)?;
    normed
        .to_dtype(x.dtype())?
        .broadcast_mul(weight)?
        .broadcast_add(bias)
}

struct LayerNorm {
    eps: f32,
    needs: [bool; 3],
}

/// Mean and reciprocal standard deviation of a row.
#[inline(always)]
fn moments(row: &[f32], eps: f32) -> (f32, f32) {
    let n = row.len() as f32;
    let mean = math::sum(row) / n;
    let variance = math::squared_deviation(row, mean) / n;
    (mean, 1.0 / (variance + eps).sqrt())
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (xs, ws, bs) = (
            slice("layer norm", x, lx)?,
            slice("layer norm", w, lw)?,
            slice("layer norm", b, lb)?,
        );
        let d = ws.len();
        if lx.dims().last() != Some(&d) || bs.len() != d || d == 0 {
            bail!(
                "layer norm: input {:?} does not fit weight [{d}] and bias [{}]",
                lx.dims(),
                bs.len()
            )
        }
        let mut out = vec![0f32; xs.len()];
        let task = ROWS_PER_TASK * d;
        out.par_chunks_mut(task)
            .zip(xs.par_chunks(task))
            .for_each(|(out, xs)| {
                vectorised(|| {
                    for (out, x) in out.chunks_exact_mut(d).zip(xs.chunks_exact(d)) {
                        let (mean, scale) = moments(x, self.eps);
                        for (((o, &x), &w), &b) in out.iter_mut().zip(x).zip(ws).zip(bs) {
                            *o = (x - mean) * scale * w + b;
                        }
                    }
                });
            });
        Ok((CpuStorage::F32(out), lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _bias: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let d = weight.dim(0)?;
        let task = ROWS_PER_TASK * d;
        with_slices("layer norm", [x, weight, grad], |[xs, ws, gs]| {
            let mut dx = vec![0f32; xs.len()];
            // With n = (x - mean) / std and g' = g * w:  dx = (g' - mean(g') - n mean(g' n)) / std.
            let partial: Vec<(Vec<f32>, Vec<f32>)> = dx
                .par_chunks_mut(task)
                .zip(xs.par_chunks(task))
                .zip(gs.par_chunks(task))
                .map(|((dx, xs), gs)| {
                    let (mut dw, mut db) = (vec![0f32; d], vec![0f32; d]);
                    let mut scaled = vec![0f32; d];
                    vectorised(|| {
                        for ((dx, x), g) in dx
                            .chunks_exact_mut(d)
                            .zip(xs.chunks_exact(d))
                            .zip(gs.chunks_exact(d))
                        {
                            let (mean, scale) = moments(x, self.eps);
                            for i in 0..d {
                                let n = (x[i] - mean) * scale;
                                dx[i] = n;
                                dw[i] += g[i] * n;
                                db[i] += g[i];
                                scaled[i] = g[i] * ws[i];
                            }
                            let mean_g = math::sum(&scaled) / d as f32;
                            let mean_gn = math::dot(&scaled, dx) / d as f32;
                            for i in 0..d {
                                dx[i] = (scaled[i] - mean_g - dx[i] * mean_gn) * scale;
                            }
                        }
                    });
                    (dw, db)
                })
                .collect();
            let add = |mut total: Vec<f32>, part: &Vec<f32>| {
                total.iter_mut().zip(part).for_each(|(t, p)| *t += p);
                total
            };
            let dw = partial.iter().fold(vec![0f32; d], |t, (w, _)| add(t, w));
            let db = partial.iter().fold(vec![0f32; d], |t, (_, b)| add(t, b));
            let [needs_x, needs_w, needs_b] = self.needs;
            Ok((
                needs_x.then(|| from_vec(dx, x.dims())).transpose()?,
                needs_w.then(|| from_vec(dw, d)).transpose()?,
                needs_b.then(|| from_vec(db, d)).transpose()?,
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradients, noise};
    use super::*;

    #[test]
    fn gradients_match_finite_differences() {
        let inputs = [noise(&[2, 130, 20], 1), noise(&[20], 2), noise(&[20], 3)];
        check_gradients(&inputs, |t| layer_norm(&t[0], &t[1], &t[2], 1e-6));
    }

    #[test]
    fn a_large_mean_does_not_cancel() -> Result<()> {
        let x = (noise(&[1, 64], 1) + 5000.0)?;
        let (w, b) = (x.ones_like()?.squeeze(0)?, x.zeros_like()?.squeeze(0)?);
        let y = layer_norm(&x, &w, &b, 1e-6)?;
        let second_moment = y.sqr()?.mean_all()?.to_scalar::<f32>()?;
        assert!((second_moment - 1.0).abs() < 1e-3, "{second_moment}");
        Ok(())
    }
}
