//! AdamW's update of many parameters, each in one fused pass.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, DType, InplaceOp1, InplaceOp2, Layout, Result, Tensor, Var, bail};
use defend_kernels::adamw::{self as kernel, AdamWStep};

use super::{is_fast, with_slices};

/// A parameter, its moments and its gradient.
#[derive(Debug, Clone, Copy)]
pub struct AdamWOperands<'a> {
    /// The parameter, changed in place.
    pub parameter: &'a Var,
    /// First and second moment, `[2, ...]` over the parameter's shape, changed in place.
    pub moments: &'a Var,
    /// Gradient of the parameter's shape.
    pub gradient: &'a Tensor,
}

/// Updates parameters and moments in place. In half precision the arithmetic is in `f32`.
///
/// # Errors
/// Those of candle, as for a gradient of another shape than its parameter.
pub fn adamw(operands: &[AdamWOperands<'_>], step: &AdamWStep) -> Result<()> {
    #[cfg(feature = "cuda")]
    on_cuda::update(operands, step)?;
    for operands in operands {
        #[cfg(feature = "cuda")]
        if on_cuda::takes(operands) {
            continue;
        }
        update(operands, step)?;
    }
    Ok(())
}

/// Index of a gradient with a value that is not finite: the first on CUDA devices, else the first of those in half precision or on
/// other devices, else the first on the CPU.
///
/// # Errors
/// Those of candle.
pub fn not_finite(operands: &[AdamWOperands<'_>]) -> Result<Option<usize>> {
    #[cfg(feature = "cuda")]
    if let Some(found) = on_cuda::not_finite(operands)? {
        return Ok(Some(found));
    }
    let (mut indices, mut squares) = (Vec::new(), Vec::new());
    for (i, operands) in operands.iter().enumerate() {
        #[cfg(feature = "cuda")]
        if on_cuda::takes(operands) {
            continue;
        }
        let gradient = operands.gradient;
        if !is_fast(&[gradient]) {
            indices.push(i);
            squares.push(gradient.to_dtype(DType::F32)?.sqr()?.sum_all()?);
        } else if !is_finite(gradient)? {
            return Ok(Some(i));
        }
    }
    if squares.is_empty() {
        return Ok(None);
    }
    // Read at once: a GPU is waited for once a step, not once a parameter.
    let squares = Tensor::stack(&squares, 0)?.to_vec1::<f32>()?;
    let mut wrong = indices.into_iter().zip(squares);
    let wrong = wrong.find(|(_, square)| !square.is_finite());
    Ok(wrong.map(|(i, _)| i))
}

/// Euclidean norm of all gradients together.
///
/// # Errors
/// Those of candle.
pub fn gradient_norm(operands: &[AdamWOperands<'_>]) -> Result<f64> {
    let (mut total, mut squares) = (0.0, Vec::new());
    for AdamWOperands { gradient, .. } in operands {
        if is_fast(&[gradient]) {
            total += with_slices("gradient norm", [gradient], |[values]| {
                Ok(kernel::sum_of_squares(values))
            })?;
        } else {
            squares.push(gradient.to_dtype(DType::F32)?.sqr()?.sum_all()?);
        }
    }
    if !squares.is_empty() {
        // Read at once: a GPU is waited for once a step, not once a parameter.
        let squares = Tensor::stack(&squares, 0)?.to_vec1::<f32>()?;
        total += squares.into_iter().map(f64::from).sum::<f64>();
    }
    Ok(total.sqrt())
}

/// Whether all values of a gradient on the CPU are finite.
fn is_finite(gradient: &Tensor) -> Result<bool> {
    with_slices("AdamW", [gradient], |[values]| {
        Ok(kernel::is_finite(values))
    })
}

fn update(operands: &AdamWOperands<'_>, step: &AdamWStep) -> Result<()> {
    let AdamWOperands {
        parameter,
        moments,
        gradient,
    } = *operands;
    let fast =
        parameter.device().is_cpu() && parameter.dtype() == DType::F32 && parameter.is_contiguous();
    if fast {
        return moments.inplace_op2(&gradient.contiguous()?, &Fused { step, parameter });
    }
    // Half precision would lose the squares of small gradients, so the arithmetic is in f32.
    let kept = parameter.dtype();
    let wide = |t: &Tensor| match t.dtype() {
        DType::F16 | DType::BF16 => t.to_dtype(DType::F32),
        _ => Ok(t.clone()),
    };
    let (first, second) = (moments.get(0)?, moments.get(1)?);
    let (first, second, gradient) = (wide(&first)?, wide(&second)?, wide(gradient)?);
    let first = ((first * step.beta1)? + (&gradient * (1.0 - step.beta1))?)?;
    let second = ((second * step.beta2)? + (gradient.sqr()? * (1.0 - step.beta2))?)?;
    let denominator = ((second.sqrt()? * step.second_correction)? + step.eps)?;
    let moved = (first.div(&denominator)? * step.step_size)?;
    let value = ((wide(parameter)? * step.keep)? - moved)?;
    parameter.set(&value.to_dtype(kept)?)?;
    let (first, second) = (first.to_dtype(kept)?, second.to_dtype(kept)?);
    moments.set(&Tensor::stack(&[&first, &second], 0)?)
}

/// Operands on CUDA devices: one launch for all on one device and of one type.
#[cfg(feature = "cuda")]
mod on_cuda {
    use candle_core::{DType, Result};

    use super::{AdamWOperands, AdamWStep};
    use defend_cuda_kernels::adamw as kernel;

    pub(super) fn takes(operands: &AdamWOperands<'_>) -> bool {
        let AdamWOperands {
            parameter,
            moments,
            gradient,
        } = operands;
        let kind = matches!(gradient.dtype(), DType::F32 | DType::BF16 | DType::F16);
        let same = gradient.dtype() == parameter.dtype() && gradient.device().is_cuda();
        let in_place = parameter.is_contiguous() && moments.is_contiguous();
        parameter.device().is_cuda() && same && kind && in_place
    }

    /// What one launch takes, and the positions of the operands that it came from.
    #[derive(Default)]
    struct Batch<'a>(Vec<usize>, Vec<kernel::Slot<'a>>);

    /// Of one device and type, and no variable twice, which would be a race.
    fn batches<'a>(operands: &[AdamWOperands<'a>]) -> Result<Vec<Batch<'a>>> {
        let mut batches: Vec<Batch<'a>> = Vec::new();
        for (i, one) in operands.iter().enumerate() {
            if !takes(one) {
                continue;
            }
            let fits = |batch: &Batch<'a>| {
                let Some(first) = batch.1.first() else {
                    return true;
                };
                let parameter = one.parameter.as_tensor();
                let same_place = first.parameter.dtype() == parameter.dtype()
                    && first.parameter.device().location() == parameter.device().location();
                let known = batch
                    .1
                    .iter()
                    .any(|known| known.parameter.id() == parameter.id());
                same_place && !known
            };
            let at = batches.iter().position(fits).unwrap_or_else(|| {
                batches.push(Batch::default());
                batches.len() - 1
            });
            let batch = &mut batches[at];
            batch.0.push(i);
            batch.1.push(kernel::Slot {
                parameter: one.parameter.as_tensor(),
                moments: one.moments.as_tensor(),
                gradient: one.gradient.contiguous()?,
            });
        }
        Ok(batches)
    }

    pub(super) fn not_finite(operands: &[AdamWOperands<'_>]) -> Result<Option<usize>> {
        for Batch(positions, slots) in batches(operands)? {
            if let Some(wrong) = kernel::first_not_finite(&slots)? {
                return Ok(Some(positions[wrong]));
            }
        }
        Ok(None)
    }

    pub(super) fn update(operands: &[AdamWOperands<'_>], step: &AdamWStep) -> Result<()> {
        for Batch(_, slots) in batches(operands)? {
            kernel::step(&slots, step)?;
        }
        Ok(())
    }
}

/// The update on `f32` CPU tensors, of moments and parameter in one pass: each is read and written once. candle lets an operation
/// change one tensor, so that of the parameter is called from within that of the moments.
struct Fused<'a> {
    step: &'a AdamWStep,
    parameter: &'a Var,
}

impl InplaceOp2 for Fused<'_> {
    fn name(&self) -> &'static str {
        "adamw-moments"
    }

    fn cpu_fwd(
        &self,
        moments: &mut CpuStorage,
        _: &Layout,
        grad: &CpuStorage,
        layout: &Layout,
    ) -> Result<()> {
        let grad = super::slice("AdamW", grad, layout)?;
        let CpuStorage::F32(moments) = moments else {
            bail!("AdamW's fused step needs f32 moments")
        };
        if moments.len() != 2 * grad.len() {
            bail!(
                "AdamW: a gradient of {} values for {}",
                grad.len(),
                moments.len() / 2
            )
        }
        self.parameter.inplace_op1(&OfParameter {
            step: self.step,
            moments: Mutex::new(moments),
            grad,
        })
    }
}

/// The part of [`Fused`] that has the parameter's values.
struct OfParameter<'a> {
    step: &'a AdamWStep,
    /// Both moments, one after the other.
    moments: Mutex<&'a mut [f32]>,
    grad: &'a [f32],
}

impl InplaceOp1 for OfParameter<'_> {
    fn name(&self) -> &'static str {
        "adamw-update"
    }

    fn cpu_fwd(&self, parameter: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let CpuStorage::F32(parameter) = parameter else {
            bail!("AdamW's fused step needs f32 parameters")
        };
        let parameter = &mut parameter[layout.start_offset()..][..self.grad.len()];
        let mut moments = self.moments.lock().unwrap_or_else(PoisonError::into_inner);
        let (first, second) = moments.split_at_mut(self.grad.len());
        kernel::update(parameter, [first, second], self.grad, self.step);
        Ok(())
    }
}
