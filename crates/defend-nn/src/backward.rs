//! The backward pass of a training step.

use std::cell::RefCell;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor};

thread_local! {
    /// Variables and their gradients, while [`backward`] runs on this thread.
    static DIRECT: RefCell<Option<Vec<(Tensor, Tensor)>>> = const { RefCell::new(None) };
}

/// Gradients of all variables that `loss` depends on, as `loss.backward()` gives them, faster.
///
/// candle adds each gradient to a tensor of zeros; those that [`crate::ops`] compute for variables are taken as they are.
///
/// # Errors
/// Those of candle.
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    DIRECT.set(Some(Vec::new()));
    // Over at the end of this function, also by an error.
    let _over = Over;
    let mut grads = loss.backward()?;
    for (variable, gradient) in DIRECT.take().unwrap_or_default() {
        // A variable may be used more than once, and by candle's own operations.
        let gradient = match grads.get(&variable) {
            Some(other) => other.add(&gradient)?,
            None => gradient,
        };
        grads.insert(&variable, gradient);
    }
    Ok(grads)
}

/// Ends [`backward`] when dropped.
struct Over;

impl Drop for Over {
    fn drop(&mut self) {
        DIRECT.set(None);
    }
}

/// What an operation gives candle as the gradient of `operand`: nothing where [`backward`] takes it.
pub(crate) fn gradient(operand: &Tensor, gradient: Tensor) -> Option<Tensor> {
    DIRECT.with_borrow_mut(|direct| match direct {
        Some(direct) if operand.is_variable() => {
            direct.push((operand.clone(), gradient.detach()));
            None
        }
        _ => Some(gradient),
    })
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::ops::{layer_norm, linear};

    /// Variables used once, twice, by candle's operations as well, through another tensor, and not at all.
    #[test]
    fn gradients_are_those_of_candle() -> Result<()> {
        let of = |shape: &[usize], seed: f32| -> Result<Var> {
            let len = shape.iter().product::<usize>();
            let values: Vec<f32> = (0..len).map(|i| (seed + 0.37 * i as f32).sin()).collect();
            Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu)?)
        };
        let (x, w, b) = (of(&[5, 6], 0.1)?, of(&[6, 6], 0.2)?, of(&[6], 0.3)?);
        let (scale, unused) = (of(&[6], 0.4)?, of(&[6], 0.5)?);
        let once = linear(&x, &w, &b)?;
        let twice = linear(&once, &w, &(b.as_tensor() * 2.0)?)?;
        let normed = layer_norm(&twice, &scale, &b, 1e-6)?;
        let loss = (normed.sqr()?.sum_all()? + w.sqr()?.sum_all()?)?;
        let (found, expected) = (backward(&loss)?, loss.backward()?);
        for var in [&x, &w, &b, &scale] {
            let (found, expected) = (found.get(var).unwrap(), expected.get(var).unwrap());
            let distance = (found - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(distance < 1e-4, "{distance}");
        }
        assert!(!found.get(&scale).unwrap().track_op());
        assert!(found.get(&unused).is_none());
        Ok(())
    }

    #[test]
    fn an_error_leaves_nothing_behind() -> Result<()> {
        let w = Var::zeros((2, 2), DType::F32, &Device::Cpu)?;
        let b = Var::zeros(2, DType::F32, &Device::Cpu)?;
        let x = Tensor::zeros((1, 2), DType::F32, &Device::Cpu)?;
        let out = linear(&x, &w, &b)?;
        // candle passes no gradients through it.
        let through = out.reshape((1, 1, 2))?.conv_transpose1d(
            &Tensor::ones((1, 1, 1), DType::F32, &Device::Cpu)?,
            0,
            0,
            1,
            1,
            1,
        )?;
        assert!(backward(&through.sum_all()?).is_err());
        assert!(DIRECT.take().is_none());
        let grads = out.sum_all()?.backward()?;
        assert!(grads.get(&w).is_some() && grads.get(&b).is_some());
        Ok(())
    }
}
