//! The training loop of the dense stage.

use candle_core::Tensor;
use defend_nn::{
    AdamW, AdamWConfig, ParameterGroup, Rng, TensorCache, TrainingStep, backward, half_cosine,
    release_memory, rows_of, shuffled_batches,
};
use defend_vit::{Grid, ImageSource, Prefix, Trainable};

use crate::crop::{CropSampler, extract};
use crate::moving_average::MovingAverage;
use crate::{DenseConfig, DenseObjective, Error, View};

/// Fine-tunes the trainable blocks of a backbone on normal images (paper, section 3.1).
#[derive(Debug, Clone)]
pub struct DenseTuner {
    config: DenseConfig,
}

/// What a run of the tuner did.
#[derive(Debug, Clone, PartialEq)]
pub struct DenseReport {
    /// Mean loss of each epoch, first epoch first.
    pub losses: Vec<f64>,
    /// Steps taken.
    pub steps: usize,
}

impl DenseTuner {
    /// A tuner with checked settings.
    ///
    /// # Errors
    /// [`Error::Config`] that names the field.
    pub fn new(config: DenseConfig) -> Result<Self, Error> {
        config.validate()?;
        Ok(Self { config })
    }

    /// Trains `backbone` and `objective` in place; `on_step` hears of every step.
    ///
    /// # Errors
    /// [`Error::NoImages`], [`Error::FrozenBackbone`], [`Error::Config`] for crops that are no multiple of the
    /// patch size, [`Error::Diverged`], and what backbone and objective return.
    pub fn tune(
        &self,
        backbone: &dyn Trainable,
        objective: &dyn DenseObjective,
        images: &dyn ImageSource,
        rng: &mut Rng,
        on_step: &mut dyn FnMut(TrainingStep),
    ) -> Result<DenseReport, Error> {
        let config = &self.config;
        let patch = backbone.spec().architecture.patch_size;
        if images.is_empty() {
            return Err(Error::NoImages);
        }
        if backbone.parameters().is_empty() {
            return Err(Error::FrozenBackbone);
        }
        if config.crop_size == 0 || !config.crop_size.is_multiple_of(patch) {
            return Err(Error::Config {
                field: "crop_size",
                value: config.crop_size.to_string(),
                expected: "a multiple of the backbone's patch size",
            });
        }
        let group = |parameters, learning_rate| ParameterGroup {
            parameters,
            learning_rate,
            weight_decay: config.weight_decay,
        };
        let groups = vec![
            group(backbone.parameters(), config.backbone_learning_rate),
            group(objective.parameters(), config.head_learning_rate),
        ];
        let mut optimiser = AdamW::new(groups, AdamWConfig::default())?;
        let mut average = config
            .target_momentum
            .map(|momentum| {
                let trained = [backbone.parameters(), objective.parameters()].concat();
                MovingAverage::new(momentum, trained)
            })
            .transpose()?;
        let sampler = CropSampler::new(config.crop_area, config.crop_aspect);
        let mut views = TensorCache::<1>::new(images.len(), config.cache_bytes);
        let steps = config.epochs * images.len().div_ceil(config.batch);
        let mut losses = Vec::with_capacity(config.epochs);
        for epoch in 0..config.epochs {
            let mut total = 0.0;
            let batches = shuffled_batches(images.len(), config.batch, rng);
            images.announce(&batches.concat());
            for indices in batches {
                let (pixels, prefix) = self.views(backbone, images, &indices, &mut views, rng)?;
                let (grid, count) = (prefix.grid, pixels.dim(0)?);
                let boxes = sampler.boxes(grid, count * config.crops, rng);
                let crops = extract(&pixels, &boxes, patch, config.crop_size)?;
                objective.constrain()?;
                // No gradient flows through the view: Q is a constant target.
                let assign =
                    || objective.assign(&backbone.features_from(&prefix)?.patches.detach());
                let assigned = match &mut average {
                    Some(average) => average.during(|| {
                        objective.constrain()?;
                        assign()
                    })?,
                    None => assign()?,
                };
                let crops = backbone.features_from(&backbone.frozen_prefix(&crops)?)?;
                let loss = objective.loss(&assigned, grid, &crops.patches, crops.grid, &boxes)?;
                let value = f64::from(loss.to_scalar::<f32>()?);
                if !value.is_finite() {
                    return Err(Error::Diverged {
                        step: optimiser.steps(),
                        loss: value,
                    });
                }
                if let Some(last) = config.final_weight_decay {
                    let first = config.weight_decay;
                    optimiser.set_weight_decay(between(first, last, optimiser.steps(), steps))?;
                }
                optimiser.step(&backward(&loss)?, 1.0)?;
                if let Some(average) = &mut average {
                    average.update()?;
                }
                total += value * indices.len() as f64;
                on_step(TrainingStep {
                    epoch,
                    step: optimiser.steps(),
                    steps,
                    images: indices.len(),
                    loss: value,
                });
            }
            losses.push(total / images.len() as f64);
        }
        objective.constrain()?;
        release_memory();
        Ok(DenseReport { losses, steps })
    }

    /// The pixels of a batch's views and their tokens after the frozen blocks.
    fn views(
        &self,
        backbone: &dyn Trainable,
        images: &dyn ImageSource,
        indices: &[usize],
        cache: &mut TensorCache<1>,
        rng: &mut Rng,
    ) -> Result<(Tensor, Prefix), Error> {
        let patch = backbone.spec().architecture.patch_size;
        let batch = images.images(indices)?;
        let grid = grid_of(&batch, patch)?;
        match self.config.view {
            View::Whole => {
                let [tokens] = cache.batch(indices, |missing| {
                    let batch = rows_of(&batch, indices, missing)?;
                    Ok::<_, Error>([backbone.frozen_prefix(&batch)?.tokens.detach()])
                })?;
                Ok((batch, Prefix { tokens, grid }))
            }
            View::Random { count, area } => {
                let sampler = CropSampler::new(area, self.config.crop_aspect);
                let boxes = sampler.boxes(grid, indices.len() * count, rng);
                let views = extract(&batch, &boxes, patch, batch.dim(2)?)?;
                let prefix = backbone.frozen_prefix(&views)?;
                Ok((views, prefix))
            }
        }
    }
}

fn grid_of(images: &Tensor, patch: usize) -> Result<Grid, Error> {
    let (_, _, height, width) = images.dims4()?;
    Ok(Grid {
        rows: height / patch,
        columns: width / patch,
    })
}

/// From `first` at step 0 to `last` at the last of `steps`, along a half cosine.
fn between(first: f64, last: f64, step: usize, steps: usize) -> f64 {
    let progress = step as f64 / steps.saturating_sub(1).max(1) as f64;
    half_cosine(first, last, progress)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PrototypeObjective;
    use candle_core::{DType, Device};
    use defend_vit::{Architecture, BackboneSpec, Encoder, TrainScope, Vit};

    fn backbone() -> Vit {
        let architecture = Architecture {
            image_size: 64,
            patch_size: 8,
            width: 32,
            depth: 3,
            heads: 2,
            mlp_width: 64,
            ..Architecture::vit_tiny()
        };
        let spec = BackboneSpec::new(architecture);
        let random = Vit::random(spec, 0.0, &mut Rng::seed(1), &Device::Cpu).unwrap();
        random.copy(TrainScope::LastBlocks(2)).unwrap()
    }

    fn config() -> DenseConfig {
        DenseConfig {
            epochs: 6,
            batch: 4,
            crops: 2,
            crop_size: 32,
            head_hidden: vec![32],
            head_output: 16,
            backbone_learning_rate: 1e-3,
            head_learning_rate: 1e-2,
            ..DenseConfig::default()
        }
    }

    /// Ten images of two halves with different textures.
    fn images() -> Tensor {
        let values: Vec<f32> = (0..10 * 3 * 64 * 64)
            .map(|i| {
                let (x, y) = (i % 64, i / 64 % 64);
                let left = x < 20 + (i / (3 * 64 * 64)) * 2;
                if left {
                    (y as f32).sin()
                } else {
                    (x as f32 * 0.7).cos()
                }
            })
            .collect();
        Tensor::from_vec(values, (10, 3, 64, 64), &Device::Cpu).unwrap()
    }

    #[test]
    fn the_loss_falls_and_only_the_last_blocks_move() -> Result<(), Error> {
        let run = || -> Result<_, Error> {
            let (vit, config) = (backbone(), config());
            let mut rng = Rng::seed(2);
            let objective = PrototypeObjective::random(&config, 32, &mut rng, &Device::Cpu)?;
            let mut seen = Vec::new();
            let tuner = DenseTuner::new(config)?;
            let report = tuner.tune(&vit, &objective, &images(), &mut rng, &mut |s| {
                seen.push(s.step);
            })?;
            assert_eq!(seen, (1..=18).collect::<Vec<_>>());
            Ok((report, vit))
        };
        let (report, vit) = run()?;
        assert!(
            report.losses[5] < 0.8 * report.losses[0],
            "{:?}",
            report.losses
        );
        let (before, after) = (backbone().state()?, vit.state()?);
        for (name, tensor) in &before {
            let moved = (tensor - &after[name])?
                .abs()?
                .flatten_all()?
                .max(0)?
                .to_scalar::<f32>()?;
            let trains = name.starts_with("blocks.1") || name.starts_with("blocks.2");
            assert_eq!(moved > 0.0, trains, "{name} moved by {moved}");
        }
        assert_eq!(report, run()?.0, "the same seed gives the same losses");
        Ok(())
    }

    #[test]
    fn every_recipe_trains_and_repeats_bit_for_bit() -> Result<(), Error> {
        let small = |recipe: DenseConfig| DenseConfig {
            head_hidden: vec![32; recipe.head_hidden.len()],
            prototypes: 5,
            queue: recipe.queue.min(300),
            // A faster average: 18 steps instead of thousands.
            target_momentum: recipe.target_momentum.map(|_| 0.9),
            view: recipe.view,
            assignment: recipe.assignment,
            resampling: recipe.resampling,
            weight_decay: recipe.weight_decay,
            final_weight_decay: recipe.final_weight_decay,
            ..config()
        };
        for recipe in [
            DenseConfig::paper(3),
            DenseConfig::official_dense(),
            DenseConfig::official_leopart(),
        ] {
            recipe.validate()?;
            let run = || -> Result<_, Error> {
                let (vit, config) = (backbone(), small(recipe.clone()));
                let mut rng = Rng::seed(2);
                let objective = PrototypeObjective::random(&config, 32, &mut rng, &Device::Cpu)?;
                let tuner = DenseTuner::new(config)?;
                tuner.tune(&vit, &objective, &images(), &mut rng, &mut |_| ())
            };
            let report = run()?;
            assert!(
                report.losses[5] < 0.9 * report.losses[0],
                "{recipe:?}: {:?}",
                report.losses
            );
            assert_eq!(report, run()?);
        }
        Ok(())
    }

    #[test]
    fn decay_rises_along_a_half_cosine() {
        let decays: Vec<f64> = (0..5).map(|step| between(0.04, 0.5, step, 5)).collect();
        assert!((decays[0] - 0.04).abs() < 1e-12 && (decays[2] - 0.27).abs() < 1e-12);
        assert!((decays[4] - 0.5).abs() < 1e-12);
    }

    #[test]
    fn impossible_runs_are_refused() -> Result<(), Error> {
        let mut rng = Rng::seed(2);
        let objective = PrototypeObjective::random(&config(), 32, &mut rng, &Device::Cpu)?;
        let tuner = DenseTuner::new(config())?;
        let none = Tensor::zeros((0, 3, 64, 64), DType::F32, &Device::Cpu)?;
        let result = tuner.tune(&backbone(), &objective, &none, &mut rng, &mut |_| ());
        assert!(matches!(result, Err(Error::NoImages)));
        let frozen = backbone().copy(TrainScope::Frozen)?;
        assert_eq!(frozen.spec().architecture.depth, 3);
        let result = tuner.tune(&frozen, &objective, &images(), &mut rng, &mut |_| ());
        assert!(matches!(result, Err(Error::FrozenBackbone)));
        let tuner = DenseTuner::new(DenseConfig {
            crop_size: 30,
            ..config()
        })?;
        let result = tuner.tune(&backbone(), &objective, &images(), &mut rng, &mut |_| ());
        assert!(matches!(
            result,
            Err(Error::Config {
                field: "crop_size",
                ..
            })
        ));
        let wrong = DenseConfig {
            crops: 9,
            ..config()
        };
        assert!(
            DenseTuner::new(wrong)
                .unwrap_err()
                .to_string()
                .contains("dense.crops is 9")
        );
        Ok(())
    }
}
