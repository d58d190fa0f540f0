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
    let norm = (x.sqr()?.sum_keepdim(D::Minus1)? + EPS)?.sqrt()?;
    x.broadcast_div(&norm)
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
