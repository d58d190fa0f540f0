//! L2 normalisation of feature vectors.

use candle_core::{D, Result, Tensor};

/// Keeps the norm's derivative finite at the zero vector.
const EPS: f64 = 1e-12;

/// Scales vectors along the last dimension to unit length (eq. 3); zero vectors stay zero.
///
/// Any shape `[..., D]`; differentiable, with finite gradients everywhere.
///
/// # Errors
/// When candle fails.
pub fn l2_normalize(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if defend_cuda_kernels::takes(x) {
        return on_cuda(&defend_cuda_kernels::aligned(x)?);
    }
    let norm = (x.sqr()?.sum_keepdim(D::Minus1)? + EPS)?.sqrt()?;
    x.broadcast_div(&norm)
}

/// The same by one kernel.
#[cfg(feature = "cuda")]
fn on_cuda(x: &Tensor) -> Result<Tensor> {
    use super::cuda::{Lengths, Precomputed};
    let (out, lengths) = defend_cuda_kernels::rows::l2_normalize(x, EPS)?;
    if !x.track_op() {
        return Ok(out);
    }
    x.apply_op1(Precomputed::new("l2-normalize", out, Lengths(lengths)))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradients, noise};
    use super::*;

    #[test]
    fn gradients_match_finite_differences() {
        check_gradients(&[noise(&[3, 4, 6], 1)], |t| l2_normalize(&t[0]));
    }

    #[test]
    fn the_zero_vector_has_a_finite_gradient() -> Result<()> {
        let x = candle_core::Var::zeros(4, candle_core::DType::F32, &candle_core::Device::Cpu)?;
        let grads = l2_normalize(&x)?.sum_all()?.backward()?;
        let grad = grads.get(&x).expect("a gradient").to_vec1::<f32>()?;
        assert!(grad.iter().all(|g| g.is_finite()));
        Ok(())
    }
}
