//! AdamW with parameter groups, each updated in one fused pass.

use std::sync::{Mutex, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{
    CpuStorage, DType, InplaceOp1, InplaceOp2, Layout, Result as CandleResult, Tensor, Var, bail,
};
use rayon::prelude::*;

use crate::Error;
use crate::ops::{is_fast, with_slices};
use defend_kernels::math;
use defend_kernels::vectorised;

/// Constants of AdamW (Loshchilov and Hutter, 2019), as `torch.optim.AdamW` names them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the gradient's running mean, `0..1`.
    pub beta1: f64,
    /// Decay of the squared gradient's running mean, `0..1`.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
}

impl Default for AdamWConfig {
    /// PyTorch's defaults: 0.9, 0.999, 1e-8.
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
        }
    }
}

/// Variables that share a learning rate and a weight decay.
#[derive(Debug, Clone)]
pub struct ParameterGroup {
    /// Names (for errors) and variables.
    pub parameters: Vec<(String, Var)>,
    /// Peak learning rate, positive.
    pub learning_rate: f64,
    /// Decoupled weight decay, per unit of learning rate.
    pub weight_decay: f64,
}

/// AdamW over parameter groups with a common learning-rate multiplier.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    groups: Vec<Group>,
    steps: usize,
}

#[derive(Debug)]
struct Group {
    slots: Vec<Slot>,
    learning_rate: f64,
    weight_decay: f64,
}

#[derive(Debug)]
struct Slot {
    name: String,
    var: Var,
    /// First and second moment: `[2, ...]` over the variable's shape.
    moments: Var,
}

impl AdamW {
    /// An optimiser with zero moments.
    ///
    /// # Errors
    /// [`Error::Config`] for a learning rate, decay or beta outside its range; [`Error::Candle`] when the
    /// moments cannot be allocated.
    pub fn new(groups: Vec<ParameterGroup>, config: AdamWConfig) -> Result<Self, Error> {
        for (field, beta) in [("beta1", config.beta1), ("beta2", config.beta2)] {
            check(field, beta, (0.0..1.0).contains(&beta), "a number in 0..1")?;
        }
        let groups = groups
            .into_iter()
            .map(|group| {
                let rate = group.learning_rate;
                check(
                    "learning_rate",
                    rate,
                    rate.is_finite() && rate > 0.0,
                    "a positive number",
                )?;
                check_decay(group.weight_decay)?;
                let slots = group
                    .parameters
                    .into_iter()
                    .map(|(name, var)| {
                        let zeros = var.zeros_like()?;
                        let moments = Var::from_tensor(&Tensor::stack(&[&zeros, &zeros], 0)?)?;
                        Ok(Slot { name, var, moments })
                    })
                    .collect::<CandleResult<_>>()?;
                Ok(Group {
                    slots,
                    learning_rate: group.learning_rate,
                    weight_decay: group.weight_decay,
                })
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self {
            config,
            groups,
            steps: 0,
        })
    }

    /// The first parameter whose gradient is not finite.
    fn first_not_finite(&self, grads: &GradStore) -> CandleResult<Option<&Slot>> {
        #[cfg(feature = "cuda")]
        if let Some(slot) = on_cuda::first_not_finite(&self.groups, grads)? {
            return Ok(Some(slot));
        }
        let (mut slots, mut squares) = (Vec::new(), Vec::new());
        for slot in self.groups.iter().flat_map(|g| &g.slots) {
            let Some(grad) = grads.get(&slot.var) else {
                continue;
            };
            #[cfg(feature = "cuda")]
            if on_cuda::takes(slot, grad) {
                continue;
            }
            if !is_fast(&[grad]) {
                slots.push(slot);
                squares.push(grad.to_dtype(DType::F32)?.sqr()?.sum_all()?);
            } else if !is_finite(grad)? {
                return Ok(Some(slot));
            }
        }
        if squares.is_empty() {
            return Ok(None);
        }
        // Read at once: a GPU is waited for once a step, not once a parameter.
        let squares = Tensor::stack(&squares, 0)?.to_vec1::<f32>()?;
        let found = slots.into_iter().zip(squares);
        let mut wrong = found.filter(|(_, square)| !square.is_finite());
        Ok(wrong.next().map(|(slot, _)| slot))
    }

    /// Steps taken so far.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Changes the weight decay of every group that has one.
    ///
    /// # Errors
    /// [`Error::Config`] for a decay outside its range.
    pub fn set_weight_decay(&mut self, decay: f64) -> Result<(), Error> {
        check_decay(decay)?;
        for group in &mut self.groups {
            if group.weight_decay > 0.0 {
                group.weight_decay = decay;
            }
        }
        Ok(())
    }

    /// Updates every variable that has a gradient; `multiplier` scales all learning rates
    /// ([`crate::Schedule::multiplier`]).
    ///
    /// # Errors
    /// [`Error::NonFiniteGradient`] before anything is changed; [`Error::Candle`] when candle fails.
    pub fn step(&mut self, grads: &GradStore, multiplier: f64) -> Result<(), Error> {
        if let Some(slot) = self.first_not_finite(grads)? {
            return Err(Error::NonFiniteGradient {
                parameter: slot.name.clone(),
                step: self.steps,
            });
        }
        self.steps += 1;
        let t = self.steps as f64;
        let AdamWConfig { beta1, beta2, eps } = self.config;
        for group in &self.groups {
            let rate = group.learning_rate * multiplier;
            let update = Update {
                beta1,
                beta2,
                eps,
                step_size: rate / (1.0 - beta1.powf(t)),
                second_correction: 1.0 / (1.0 - beta2.powf(t)).sqrt(),
                keep: 1.0 - rate * group.weight_decay,
            };
            #[cfg(feature = "cuda")]
            on_cuda::step(&group.slots, grads, &update)?;
            for slot in &group.slots {
                if let Some(grad) = grads.get(&slot.var) {
                    #[cfg(feature = "cuda")]
                    if on_cuda::takes(slot, grad) {
                        continue;
                    }
                    update.apply(slot, grad)?;
                }
            }
        }
        Ok(())
    }
}

fn check(field: &'static str, value: f64, ok: bool, expected: &'static str) -> Result<(), Error> {
    if ok {
        return Ok(());
    }
    Err(Error::Config {
        field,
        value,
        expected,
    })
}

fn check_decay(decay: f64) -> Result<(), Error> {
    let ok = decay.is_finite() && decay >= 0.0;
    check("weight_decay", decay, ok, "zero or a positive number")
}

/// Whether all values of a gradient on the CPU are finite: a sum of squares is not when one of them is not.
fn is_finite(grad: &Tensor) -> CandleResult<bool> {
    with_slices("AdamW", [grad], |[values]| {
        let chunks = values.par_chunks(ELEMENTS_PER_TASK);
        Ok(chunks.all(|part| vectorised!(|| math::dot(part, part)).is_finite()))
    })
}

/// Constants of a step.
#[derive(Clone, Copy)]
pub(crate) struct Update {
    pub(crate) beta1: f64,
    pub(crate) beta2: f64,
    pub(crate) eps: f64,
    pub(crate) step_size: f64,
    /// Of the second moment's root.
    pub(crate) second_correction: f64,
    /// What the weight decay leaves of a parameter.
    pub(crate) keep: f64,
}

impl Update {
    fn apply(&self, slot: &Slot, grad: &Tensor) -> CandleResult<()> {
        let fast = slot.var.device().is_cpu()
            && slot.var.dtype() == DType::F32
            && slot.var.is_contiguous();
        if fast {
            let fused = Fused {
                update: self,
                parameter: &slot.var,
            };
            return slot.moments.inplace_op2(&grad.contiguous()?, &fused);
        }
        // Half precision would lose the squares of small gradients, so the arithmetic is in f32.
        let kept = slot.var.dtype();
        let wide = |t: &Tensor| match t.dtype() {
            DType::F16 | DType::BF16 => t.to_dtype(DType::F32),
            _ => Ok(t.clone()),
        };
        let (first, second) = (slot.moments.get(0)?, slot.moments.get(1)?);
        let (first, second, grad) = (wide(&first)?, wide(&second)?, wide(grad)?);
        let first = ((first * self.beta1)? + (&grad * (1.0 - self.beta1))?)?;
        let second = ((second * self.beta2)? + (grad.sqr()? * (1.0 - self.beta2))?)?;
        let denominator = ((second.sqrt()? * self.second_correction)? + self.eps)?;
        let moved = (first.div(&denominator)? * self.step_size)?;
        let parameter = ((wide(&slot.var)? * self.keep)? - moved)?;
        slot.var.set(&parameter.to_dtype(kept)?)?;
        let (first, second) = (first.to_dtype(kept)?, second.to_dtype(kept)?);
        slot.moments.set(&Tensor::stack(&[&first, &second], 0)?)
    }
}

/// Slots on CUDA devices: one launch for all of a group on one device and of one type.
#[cfg(feature = "cuda")]
mod on_cuda {
    use candle_core::backprop::GradStore;
    use candle_core::{DType, Result, Tensor};

    use super::{Group, Slot, Update};
    use crate::cuda::adamw as kernel;

    pub(super) fn takes(slot: &Slot, grad: &Tensor) -> bool {
        let kind = matches!(grad.dtype(), DType::F32 | DType::BF16 | DType::F16);
        let same = grad.dtype() == slot.var.dtype() && grad.device().is_cuda();
        let in_place = slot.var.is_contiguous() && slot.moments.is_contiguous();
        slot.var.device().is_cuda() && same && kind && in_place
    }

    /// What one launch takes, and the slots that it came from.
    #[derive(Default)]
    struct Batch<'a>(Vec<&'a Slot>, Vec<kernel::Slot<'a>>);

    /// Of one device and type, and no variable twice, which would be a race.
    fn batches<'a>(
        slots: impl IntoIterator<Item = &'a Slot>,
        grads: &GradStore,
    ) -> Result<Vec<Batch<'a>>> {
        let mut batches: Vec<Batch<'a>> = Vec::new();
        for slot in slots {
            let Some(grad) = grads.get(&slot.var).filter(|grad| takes(slot, grad)) else {
                continue;
            };
            let fits = |batch: &Batch<'a>| {
                let Some(first) = batch.0.first() else {
                    return true;
                };
                let place = |slot: &Slot| (slot.var.dtype(), slot.var.device().location());
                let known = batch.0.iter().any(|known| known.var.id() == slot.var.id());
                place(first) == place(slot) && !known
            };
            let at = batches.iter().position(fits).unwrap_or_else(|| {
                batches.push(Batch::default());
                batches.len() - 1
            });
            let batch = &mut batches[at];
            batch.0.push(slot);
            batch.1.push(kernel::Slot {
                parameter: slot.var.as_tensor(),
                moments: slot.moments.as_tensor(),
                gradient: grad.contiguous()?,
            });
        }
        Ok(batches)
    }

    pub(super) fn first_not_finite<'a>(
        groups: &'a [Group],
        grads: &GradStore,
    ) -> Result<Option<&'a Slot>> {
        for Batch(slots, theirs) in batches(groups.iter().flat_map(|g| &g.slots), grads)? {
            if let Some(wrong) = kernel::first_not_finite(&theirs)? {
                return Ok(Some(slots[wrong]));
            }
        }
        Ok(None)
    }

    pub(super) fn step(slots: &[Slot], grads: &GradStore, update: &Update) -> Result<()> {
        for batch in batches(slots, grads)? {
            kernel::step(&batch.1, update)?;
        }
        Ok(())
    }
}

/// Elements a parallel task handles.
const ELEMENTS_PER_TASK: usize = 32 * 1024;

/// The update on `f32` CPU tensors, of moments and parameter in one pass: each is read and written once. candle lets an operation
/// change one tensor, so that of the parameter is called from within that of the moments.
struct Fused<'a> {
    update: &'a Update,
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
    ) -> CandleResult<()> {
        let grad = crate::ops::slice("AdamW", grad, layout)?;
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
            update: self.update,
            moments: Mutex::new(moments),
            grad,
        })
    }
}

/// The part of [`Fused`] that has the parameter's values.
struct OfParameter<'a> {
    update: &'a Update,
    /// Both moments, one after the other.
    moments: Mutex<&'a mut [f32]>,
    grad: &'a [f32],
}

impl InplaceOp1 for OfParameter<'_> {
    fn name(&self) -> &'static str {
        "adamw-update"
    }

    fn cpu_fwd(&self, parameter: &mut CpuStorage, layout: &Layout) -> CandleResult<()> {
        let CpuStorage::F32(parameter) = parameter else {
            bail!("AdamW's fused step needs f32 parameters")
        };
        let parameter = &mut parameter[layout.start_offset()..][..self.grad.len()];
        let mut moments = self.moments.lock().unwrap_or_else(PoisonError::into_inner);
        let (first, second) = moments.split_at_mut(self.grad.len());
        let Update { beta1, beta2, .. } = *self.update;
        // 1 - beta in f64: in f32 it would lose five digits for beta2 = 0.999.
        let [old1, new1] = [beta1 as f32, (1.0 - beta1) as f32];
        let [old2, new2] = [beta2 as f32, (1.0 - beta2) as f32];
        let (keep, step) = (self.update.keep as f32, self.update.step_size as f32);
        let correction = self.update.second_correction as f32;
        let eps = self.update.eps as f32;
        parameter
            .par_chunks_mut(ELEMENTS_PER_TASK)
            .zip(first.par_chunks_mut(ELEMENTS_PER_TASK))
            .zip(second.par_chunks_mut(ELEMENTS_PER_TASK))
            .zip(self.grad.par_chunks(ELEMENTS_PER_TASK))
            .for_each(|(((parameter, first), second), grad)| {
                vectorised!(|| {
                    let moments = first.iter_mut().zip(second);
                    for ((p, (m, v)), &g) in parameter.iter_mut().zip(moments).zip(grad) {
                        *m = old1 * *m + new1 * g;
                        *v = old2 * *v + new2 * g * g;
                        *p = *p * keep - step * *m / (v.sqrt() * correction + eps);
                    }
                });
            });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn minimise(dtype: DType) -> Result<Vec<f64>, Error> {
        let start = Tensor::new(&[3.0f32, -2.0, 0.5], &Device::Cpu)?.to_dtype(dtype)?;
        let var = Var::from_tensor(&start)?;
        let group = ParameterGroup {
            parameters: vec![("x".into(), var.clone())],
            learning_rate: 0.1,
            weight_decay: 0.01,
        };
        let mut optimiser = AdamW::new(vec![group], AdamWConfig::default())?;
        for _ in 0..20 {
            let grads = var.sqr()?.sum_all()?.backward()?;
            optimiser.step(&grads, 1.0)?;
        }
        Ok(var.to_dtype(DType::F64)?.to_vec1()?)
    }

    #[test]
    fn fused_and_composed_steps_agree() -> Result<(), Error> {
        let (fused, composed) = (minimise(DType::F32)?, minimise(DType::F64)?);
        for (a, b) in fused.iter().zip(&composed) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
        assert!(fused[0] < 1.3);
        Ok(())
    }

    #[test]
    fn a_gradient_that_is_not_finite_changes_nothing() -> Result<(), Error> {
        let var = Var::new(&[1.0f32, 2.0], &Device::Cpu)?;
        let group = ParameterGroup {
            parameters: vec![("head.weight".into(), var.clone())],
            learning_rate: 0.1,
            weight_decay: 0.0,
        };
        let mut optimiser = AdamW::new(vec![group], AdamWConfig::default())?;
        let grads = (var.as_tensor() * f64::NAN)?.sum_all()?.backward()?;
        let error = optimiser.step(&grads, 1.0).unwrap_err();
        assert!(error.to_string().contains("head.weight"), "{error}");
        assert_eq!(var.to_vec1::<f32>()?, [1.0, 2.0]);
        Ok(())
    }
}
