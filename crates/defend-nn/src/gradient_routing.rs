//! How gradients of parameters reach the optimiser without candle's additions.
//!
//! candle's backward pass adds each gradient to a tensor of zeros, and its operations take three operands at most; a transformer
//! block has twelve parameters. Two devices solve both:
//!
//! ```text
//! forward                               backward
//!
//!  anchor(0) <- weight, bias             loss
//!     |                                    |
//!  anchor(1) <- weight, bias             block: gradient of x goes on as candle wants it;
//!     |                                    |    those of the parameters are left in `ParameterGradients`
//!    ...                                   v
//!     |                                  anchor(n): takes its pair from there and calls `route`
//!  block(x, anchor(n)) -> y                |
//!                                         ...    `route`: into the `GRADIENT_SINK` of `backward` where one runs,
//!                                                         else to candle
//! ```
//!
//! * An operation with many parameters has a chain of *anchors* as its second operand ([`anchored`]): side nodes of one value, each
//!   with a pair of parameters as operands. candle visits them after the operation itself.
//! * [`backward`] opens a *sink* for its thread. [`route`] puts a variable's gradient there instead of giving it to candle, and
//!   [`without_sink`] hides it from kernels that may run other work meanwhile.

use std::cell::Cell;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

/// Variables and their gradients.
type Sink = Option<Vec<(Tensor, Tensor)>>;

thread_local! {
    /// What [`backward`] has been handed while it runs on this thread.
    static GRADIENT_SINK: Cell<Sink> = const { Cell::new(None) };
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
    let sink = GRADIENT_SINK.take();
    drop(outer);
    for (variable, gradient) in sink.unwrap_or_default() {
        // A variable may be used more than once, and by candle's own operations.
        let gradient = match grads.get(&variable) {
            Some(other) => other.add(&gradient)?,
            None => gradient,
        };
        grads.insert(&variable, gradient);
    }
    Ok(grads)
}

/// Sets [`GRADIENT_SINK`] until it is dropped, also by an error or a panic.
struct Restored(Sink);

impl Restored {
    fn new(sink: Sink) -> Self {
        Self(GRADIENT_SINK.replace(sink))
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        GRADIENT_SINK.set(self.0.take());
    }
}

/// Runs a kernel as if no [`backward`] ran on this thread: one that waits for others may meanwhile take up another job of the
/// thread pool, with a backward pass of its own.
pub(crate) fn without_sink<R>(kernel: impl FnOnce() -> R) -> R {
    let _outer = Restored::new(None);
    kernel()
}

/// What an operation gives candle of the gradient that it has for `operand`: nothing where [`backward`] takes it.
pub(crate) fn route(operand: &Tensor, gradient: Option<Tensor>) -> Option<Tensor> {
    let gradient = gradient?;
    let mut sink = GRADIENT_SINK.take();
    let taken = sink.as_mut().filter(|_| operand.is_variable());
    let left = match taken {
        Some(taken) => {
            taken.push((operand.clone(), gradient.detach()));
            None
        }
        None => Some(gradient),
    };
    GRADIENT_SINK.set(sink);
    left
}

/// Gradients of some parameters, in pairs of a weight and a bias, once the operation's backward pass has run.
pub(crate) type ParameterGradients = Arc<Mutex<Option<Vec<Tensor>>>>;

/// A gradient anchor: a side node of the graph from which the backward pass reaches pairs of parameters after the operation that it
/// is an operand of, and then what `anchor` reaches: a number, or the anchor of another operation.
///
/// `parameters`: weights and biases in turn; `gradients`: where the operation leaves theirs, in the same order.
pub(crate) fn anchored(
    mut anchor: Tensor,
    parameters: &[&Tensor],
    gradients: &ParameterGradients,
) -> Result<Tensor> {
    if parameters.iter().any(|p| p.track_op()) {
        for (pair, operands) in parameters.chunks_exact(2).enumerate() {
            let node = Anchor {
                gradients: Arc::clone(gradients),
                pair,
            };
            anchor = anchor.apply_op3(operands[0], operands[1], node)?;
        }
    }
    Ok(anchor)
}

/// Locks what an operation's forward and backward pass share.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A poisoned lock means that a thread panicked elsewhere: what is stored is replaced as a whole, never half.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hands the gradients of two parameters to candle's backward pass.
struct Anchor {
    gradients: ParameterGradients,
    /// Index of the pair.
    pair: usize,
}

impl CustomOp3 for Anchor {
    fn name(&self) -> &'static str {
        "gradient-anchor"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        anchor: &candle_core::CudaStorage,
        layout: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        Ok((anchor.try_clone(layout)?, layout.shape().clone()))
    }

    fn bwd(
        &self,
        anchor: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let gradients = lock(&self.gradients);
        let Some(gradients) = &*gradients else {
            bail!("gradients of parameters were asked for before their operation's backward pass")
        };
        let of = |t: &Tensor, i: usize| {
            let found = t.track_op().then(|| gradients[2 * self.pair + i].clone());
            route(t, found)
        };
        let anchor = anchor.track_op().then(|| anchor.zeros_like()).transpose()?;
        Ok((anchor, of(weight, 0), of(bias, 1)))
    }
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
            let plain = without_sink(|| self.other.backward())?;
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
