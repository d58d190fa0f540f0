//! The backward pass of a training step.

use std::cell::Cell;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor};

/// Variables and their gradients.
type Direct = Option<Vec<(Tensor, Tensor)>>;

thread_local! {
    /// What [`backward`] has been handed while it runs on this thread.
    static DIRECT: Cell<Direct> = const { Cell::new(None) };
}

/// Gradients of all variables that `loss` depends on, as `loss.backward()` gives them, faster: candle adds each gradient to a
/// tensor of zeros.
///
/// Those of weights, biases, norms and blocks that [`crate::ops`] compute are taken as they are. A variable that is used more than
/// once may have its gradients added in another order.
///
/// # Errors
/// Those of candle.
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    let outer = Restored::new(Some(Vec::new()));
    let mut grads = loss.backward()?;
    let direct = DIRECT.take();
    drop(outer);
    for (variable, gradient) in direct.unwrap_or_default() {
        // A variable may be used more than once, and by candle's own operations.
        let gradient = match grads.get(&variable) {
            Some(other) => other.add(&gradient)?,
            None => gradient,
        };
        grads.insert(&variable, gradient);
    }
    Ok(grads)
}

/// Sets [`DIRECT`] until it is dropped, also by an error or a panic.
struct Restored(Direct);

impl Restored {
    fn new(direct: Direct) -> Self {
        Self(DIRECT.replace(direct))
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        DIRECT.set(self.0.take());
    }
}

/// Runs a kernel as if no [`backward`] ran on this thread: one that waits for others may meanwhile take up another job of the
/// thread pool, with a backward pass of its own.
pub(crate) fn apart<R>(kernel: impl FnOnce() -> R) -> R {
    let _outer = Restored::new(None);
    kernel()
}

/// What an operation gives candle of the gradient that it has for `operand`: nothing where [`backward`] takes it.
pub(crate) fn unless_taken(operand: &Tensor, gradient: Option<Tensor>) -> Option<Tensor> {
    let gradient = gradient?;
    let mut direct = DIRECT.take();
    let taken = direct.as_mut().filter(|_| operand.is_variable());
    let left = match taken {
        Some(taken) => {
            taken.push((operand.clone(), gradient.detach()));
            None
        }
        None => Some(gradient),
    };
    DIRECT.set(direct);
    left
}

#[cfg(test)]
mod tests {
    use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Var};

    use super::*;
    use crate::ops::testing::{distance, noise};
    use crate::ops::{layer_norm, linear};

    fn variables(shapes: &[&[usize]]) -> Result<Vec<Var>> {
        let tensors = shapes
            .iter()
            .zip(0..)
            .map(|(shape, seed)| noise(shape, seed));
        tensors.map(|tensor| Var::from_tensor(&tensor)).collect()
    }

    fn same(found: &GradStore, expected: &GradStore, variables: &[Var]) {
        for var in variables {
            let [found, expected] = [found, expected].map(|grads| grads.get(var).unwrap());
            assert!(distance(found, expected) < 1e-4);
        }
    }

    /// Variables used once, twice, by candle's operations as well, through another tensor, and not at all.
    #[test]
    fn gradients_are_those_of_candle() -> Result<()> {
        let variables = variables(&[&[5, 6], &[6, 6], &[6], &[6], &[6]])?;
        let [x, w, b, scale, unused] = &variables[..] else {
            unreachable!()
        };
        let once = linear(x, w, b)?;
        let twice = linear(&once, w, &(b.as_tensor() * 2.0)?)?;
        let normed = layer_norm(&twice, scale, b, 1e-6)?;
        let loss = (normed.sqr()?.sum_all()? + w.sqr()?.sum_all()?)?;
        let found = backward(&loss)?;
        same(&found, &loss.backward()?, &variables[..4]);
        assert!(!found.get(scale).unwrap().track_op());
        assert!(found.get(unused).is_none());
        Ok(())
    }

    #[test]
    fn an_error_leaves_nothing_behind() -> Result<()> {
        let variables = variables(&[&[4, 2], &[2, 2], &[2]])?;
        let [x, w, b] = &variables[..] else {
            unreachable!()
        };
        // candle passes no gradients through it, and comes there after the other half.
        let ones = Tensor::ones((1, 1, 1), DType::F32, &Device::Cpu)?;
        let refused = x
            .reshape((4, 1, 2))?
            .conv_transpose1d(&ones, 0, 0, 1, 1, 1)?;
        let refused = linear(&refused.reshape((4, 2))?, w, b)?;
        assert!(backward(&refused.sum_all()?).is_err());
        let loss = linear(x, w, b)?.sum_all()?;
        // Before anything else looks at what is left.
        let plain = loss.backward()?;
        same(&plain, &backward(&loss)?, &variables);
        Ok(())
    }

    /// Passes a gradient on, after other backward passes on this thread.
    struct Interrupted {
        other: Tensor,
        variables: Vec<Var>,
    }

    impl CustomOp1 for Interrupted {
        fn name(&self) -> &'static str {
            "interrupted"
        }

        fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
            Ok((x.clone(), layout.shape().clone()))
        }

        fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
            let inner = backward(&self.other)?;
            let plain = apart(|| self.other.backward())?;
            same(&inner, &plain, &self.variables);
            Ok(Some(grad.clone()))
        }
    }

    #[test]
    fn a_backward_pass_within_another_takes_its_own() -> Result<()> {
        let shapes: [&[usize]; 4] = [&[4, 6], &[6, 6], &[6], &[6]];
        let (outer, inner) = (variables(&shapes)?, variables(&shapes)?);
        let loss = |v: &[Var], interrupted: Option<Interrupted>| -> Result<Tensor> {
            let below = linear(&v[0], &v[1], &v[2])?;
            let passed = match interrupted {
                Some(op) => below.apply_op1(op)?,
                None => below,
            };
            layer_norm(&passed, &v[3], &v[2], 1e-6)?.sqr()?.sum_all()
        };
        let op = Interrupted {
            other: loss(&inner, None)?,
            variables: inner,
        };
        let found = backward(&loss(&outer, Some(op))?)?;
        same(&found, &loss(&outer, None)?.backward()?, &outer);
        Ok(())
    }
}
