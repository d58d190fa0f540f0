//! AdamW with parameter groups.

use candle_core::backprop::GradStore;
use candle_core::{Result as CandleResult, Tensor, Var};
use defend_nn::ops::{self, AdamWOperands, AdamWStep};

use crate::Error;

/// Constants of AdamW (Loshchilov and Hutter, 2019), as `torch.optim.AdamW` names them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the gradient's running mean, `0..1`.
    pub beta1: f64,
    /// Decay of the squared gradient's running mean, `0..1`.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Largest Euclidean norm of all gradients together; larger ones are scaled down to it, as `torch.nn.utils.clip_grad_norm_` does.
    /// `None` lets them be.
    pub gradient_clip: Option<f64>,
}

impl Default for AdamWConfig {
    /// PyTorch's defaults: 0.9, 0.999, 1e-8, no clipping.
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            gradient_clip: None,
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
        if let Some(clip) = config.gradient_clip {
            let fine = clip.is_finite() && clip > 0.0;
            check("gradient_clip", clip, fine, "a positive number")?;
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
    /// ([`crate::Schedule::multiplier`]). The Euclidean norm of all gradients together, before they are clipped.
    ///
    /// # Errors
    /// [`Error::NonFiniteGradient`] before anything is changed; [`Error::Candle`] when candle fails.
    pub fn step(&mut self, grads: &GradStore, multiplier: f64) -> Result<f64, Error> {
        let slots = || self.groups.iter().flat_map(|group| &group.slots);
        let trained: Vec<&Slot> = slots().filter(|s| grads.get(&s.var).is_some()).collect();
        let operands: Vec<_> = slots().filter_map(|slot| slot.operands(grads)).collect();
        if let Some(wrong) = ops::adamw_not_finite(&operands)? {
            return Err(Error::NonFiniteGradient {
                parameter: trained[wrong].name.clone(),
                step: self.steps,
                images: Vec::new(),
            });
        }
        let norm = ops::gradient_norm(&operands)?;
        let scale = self.config.gradient_clip.map(|clip| clip / (norm + 1e-6));
        let scaled: Vec<Option<Tensor>> = slots()
            .map(|slot| match (scale, grads.get(&slot.var)) {
                (Some(scale), Some(gradient)) if scale < 1.0 => (gradient * scale).map(Some),
                _ => Ok(None),
            })
            .collect::<CandleResult<_>>()?;
        let mut scaled = scaled.iter();
        self.steps += 1;
        let t = self.steps as f64;
        let AdamWConfig {
            beta1, beta2, eps, ..
        } = self.config;
        for group in &self.groups {
            let rate = group.learning_rate * multiplier;
            let step = AdamWStep {
                beta1,
                beta2,
                eps,
                step_size: rate / (1.0 - beta1.powf(t)),
                second_correction: 1.0 / (1.0 - beta2.powf(t)).sqrt(),
                keep: 1.0 - rate * group.weight_decay,
            };
            let operands = group.slots.iter().zip(&mut scaled);
            let operands = operands.filter_map(|(slot, scaled)| {
                let mut operands = slot.operands(grads)?;
                operands.gradient = scaled.as_ref().unwrap_or(operands.gradient);
                Some(operands)
            });
            ops::adamw(&operands.collect::<Vec<_>>(), &step)?;
        }
        Ok(norm)
    }

    /// Everything that changes from step to step beside the number of steps: each variable that trains and its moments
    /// (`[2, ...]` over its shape), under names that are unique.
    pub(crate) fn variables(&self) -> Vec<(String, &Var)> {
        let mut variables = Vec::new();
        for (i, group) in self.groups.iter().enumerate() {
            for (j, slot) in group.slots.iter().enumerate() {
                variables.push((format!("parameters.{i}.{j}.{}", slot.name), &slot.var));
                variables.push((format!("moments.{i}.{j}.{}", slot.name), &slot.moments));
            }
        }
        variables
    }

    /// Goes on after `steps` steps, once [`AdamW::variables`] have their values of then.
    pub(crate) fn set_steps(&mut self, steps: usize) {
        self.steps = steps;
    }
}

impl Slot {
    fn operands<'a>(&'a self, grads: &'a GradStore) -> Option<AdamWOperands<'a>> {
        Some(AdamWOperands {
            parameter: &self.var,
            moments: &self.moments,
            gradient: grads.get(&self.var)?,
        })
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

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

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
