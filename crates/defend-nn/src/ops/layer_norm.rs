//! Layer normalisation over the last dimension.

use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{from_vec, is_fast, slice, with_slices};
use crate::gradient_routing::route;
use defend_kernels::{ROWS_PER_TASK, column_sums, norm};

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
    #[cfg(feature = "cuda")]
    if let Some(out) = on_cuda(x, weight, bias, eps)? {
        return Ok(out);
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

/// The same by one kernel, on tensors that it takes.
#[cfg(feature = "cuda")]
fn on_cuda(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Option<Tensor>> {
    use super::cuda::{NormGradients, Precomputed};
    use defend_cuda_kernels::aligned;
    let dims = [x.dim(D::Minus1)?];
    let fits = |t: &Tensor| t.dtype() == x.dtype() && t.dims() == dims;
    if !defend_cuda_kernels::takes(x) || !fits(weight) || !fits(bias) {
        return Ok(None);
    }
    let [x, weight, bias] = [aligned(x)?, aligned(weight)?, aligned(bias)?];
    let keep = [&x, &weight, &bias].iter().any(|t| t.track_op());
    let (out, kept) = defend_cuda_kernels::rows::layer_norm(&x, [&weight, &bias], eps, keep)?;
    let Some(kept) = kept else {
        return Ok(Some(out));
    };
    let op = Precomputed::new("layer-norm", out, NormGradients(kept));
    x.apply_op3(&weight, &bias, op).map(Some)
}

struct LayerNorm {
    eps: f32,
    needs: [bool; 3],
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
                norm::forward(out, xs, [ws, bs], self.eps);
            });
        Ok((CpuStorage::F32(out), lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let d = weight.dim(0)?;
        let task = ROWS_PER_TASK * d;
        let [dx, dw, db] = with_slices("layer norm", [x, weight, grad], |[xs, ws, gs]| {
            let mut dx = vec![0f32; xs.len()];
            let tasks = xs.len().div_ceil(task);
            let mut sums = vec![0f32; tasks * 2 * d];
            dx.par_chunks_mut(task)
                .zip(sums.par_chunks_mut(2 * d))
                .zip(xs.par_chunks(task))
                .zip(gs.par_chunks(task))
                .for_each(|(((dx, sums), xs), gs)| {
                    norm::backward(dx, sums, xs, gs, ws, self.eps, None);
                });
            let mut dw = column_sums(&sums, 2 * d);
            let db = dw.split_off(d);
            let [needs_x, needs_w, needs_b] = self.needs;
            Ok([
                needs_x.then(|| from_vec(dx, x.dims())).transpose()?,
                needs_w.then(|| from_vec(dw, d)).transpose()?,
                needs_b.then(|| from_vec(db, d)).transpose()?,
            ])
        })?;
        Ok((dx, route(weight, dw), route(bias, db)))
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
