//! The training stage of the dense loss.

use std::collections::BTreeMap;

use candle_core::Tensor;
use defend_nn::Rng;
use defend_train::{
    AdamW, AdamWConfig, MovingAverage, ParameterGroup, TensorCache, Training, TrainingPlan,
    TrainingReport, TrainingStage, half_cosine, rows_of, train,
};
use defend_vit::{FrozenTokens, Grid, ImageSource, Trainable};

use crate::crop::{CropSampler, extract};
use crate::{DenseConfig, DenseObjective, Error, View};

/// Names of the moving averages in a checkpoint begin so.
const AVERAGE: &str = "average.";

/// Fine-tunes the trainable blocks of a backbone on normal images (paper, section 3.1).
#[derive(Debug, Clone)]
pub struct DenseTuner {
    config: DenseConfig,
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

    /// Trains `backbone` and `objective` in place.
    ///
    /// # Errors
    /// [`Error::FrozenBackbone`], [`Error::Config`] for crops that are no multiple of the patch size, those of [`train`], and what
    /// backbone and objective return.
    pub fn tune(
        &self,
        backbone: &dyn Trainable,
        objective: &dyn DenseObjective,
        images: &dyn ImageSource,
        training: Training<'_>,
    ) -> Result<TrainingReport, Error> {
        let config = &self.config;
        let patch = backbone.spec().architecture.patch_size;
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
        let mut optimiser = AdamW::new(
            groups,
            AdamWConfig {
                gradient_clip: config.gradient_clip,
                ..AdamWConfig::default()
            },
        )?;
        let average = config.target_momentum.map(|momentum| {
            let parts = [
                ("backbone", backbone.parameters()),
                ("objective", objective.parameters()),
            ];
            let named = parts.into_iter().flat_map(|(part, parameters)| {
                let named = move |(name, var)| (format!("{part}.{name}"), var);
                parameters.into_iter().map(named)
            });
            MovingAverage::new(momentum, named.collect())
        });
        let mut stage = DenseTuning {
            config,
            backbone,
            objective,
            images,
            average: average.transpose()?,
            sampler: CropSampler::new(config.crop_area, config.crop_aspect),
            views: TensorCache::new(images.len(), config.cache_bytes),
        };
        let plan = TrainingPlan {
            images: images.len(),
            batch_size: config.batch_size,
            epochs: config.epochs,
        };
        let report = train(&mut stage, &mut optimiser, &plan, training)?;
        objective.constrain()?;
        Ok(report)
    }
}

struct DenseTuning<'a> {
    config: &'a DenseConfig,
    backbone: &'a dyn Trainable,
    objective: &'a dyn DenseObjective,
    images: &'a dyn ImageSource,
    /// The assigning network, where it is not the trained one.
    average: Option<MovingAverage>,
    sampler: CropSampler,
    /// Tokens of whole images after the frozen blocks.
    views: TensorCache<1>,
}

impl TrainingStage for DenseTuning<'_> {
    type Error = Error;

    fn prefetch(&self, order: &[usize]) {
        self.images.prefetch(order);
    }

    fn loss(&mut self, indices: &[usize], rng: &mut Rng) -> Result<Tensor, Error> {
        let (config, backbone, objective) = (self.config, self.backbone, self.objective);
        let patch = backbone.spec().architecture.patch_size;
        let (pixels, prefix) = self.views(indices, rng)?;
        let (grid, count) = (prefix.grid, pixels.dim(0)?);
        let boxes = self.sampler.boxes(grid, count * config.crops, rng);
        let crops = extract(&pixels, &boxes, patch, config.crop_size)?;
        objective.constrain()?;
        // No gradient flows through the view: Q is a constant target.
        let assign = || objective.assign(&backbone.features_from_frozen(&prefix)?.patches.detach());
        let assigned = match &mut self.average {
            Some(average) => average.during(|| {
                objective.constrain()?;
                assign()
            })?,
            None => assign()?,
        };
        let crops = backbone.features_from_frozen(&backbone.frozen_tokens(&crops)?)?;
        objective.loss(&assigned, grid, &crops.patches, crops.grid, &boxes)
    }

    fn schedule(&self, optimiser: &mut AdamW, step: usize, steps: usize) -> Result<f64, Error> {
        if let Some(last) = self.config.final_weight_decay {
            let first = self.config.weight_decay;
            optimiser.set_weight_decay(between(first, last, step, steps))?;
        }
        Ok(1.0)
    }

    fn after_step(&mut self) -> Result<(), Error> {
        if let Some(average) = &mut self.average {
            average.update()?;
        }
        Ok(())
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>, Error> {
        let mut state = self.objective.state()?;
        if let Some(average) = &self.average {
            let averages = average.state().into_iter();
            state.extend(averages.map(|(name, tensor)| (format!("{AVERAGE}{name}"), tensor)));
        }
        Ok(state)
    }

    fn restore(&mut self, mut state: BTreeMap<String, Tensor>) -> Result<(), Error> {
        if let Some(average) = &mut self.average {
            let named = state.iter().filter_map(|(name, tensor)| {
                Some((name.strip_prefix(AVERAGE)?.to_owned(), tensor.clone()))
            });
            average.restore(&mut named.collect())?;
            state.retain(|name, _| !name.starts_with(AVERAGE));
        }
        self.objective.restore(state)
    }
}

impl DenseTuning<'_> {
    /// The pixels of a batch's views and their tokens after the frozen blocks.
    fn views(&mut self, indices: &[usize], rng: &mut Rng) -> Result<(Tensor, FrozenTokens), Error> {
        let backbone = self.backbone;
        let patch = backbone.spec().architecture.patch_size;
        let batch = self.images.images(indices)?;
        let grid = grid_of(&batch, patch)?;
        match self.config.view {
            View::Whole => {
                let [tokens] = self.views.batch(indices, |missing| {
                    let batch = rows_of(&batch, indices, missing)?;
                    Ok::<_, Error>([backbone.frozen_tokens(&batch)?.tokens.detach()])
                })?;
                Ok((batch, FrozenTokens { tokens, grid }))
            }
            View::Random { count, area } => {
                let sampler = CropSampler::new(area, self.config.crop_aspect);
                let boxes = sampler.boxes(grid, indices.len() * count, rng);
                let views = extract(&batch, &boxes, patch, batch.dim(2)?)?;
                let prefix = backbone.frozen_tokens(&views)?;
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
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;
    use crate::PrototypeObjective;
    use candle_core::{DType, Device};
    use defend_train::Checkpoints;
    use defend_vit::{Architecture, BackboneSpec, Encoder, TrainScope, Vit};
    use std::ops::ControlFlow;

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
            batch_size: 4,
            crops: 2,
            crop_size: 32,
            head_hidden: vec![32],
            head_output: 16,
            backbone_learning_rate: 1e-3,
            head_learning_rate: 1e-2,
            ..DenseConfig::default()
        }
    }

    /// Images that cannot be read any more after so many batches.
    struct Stopping(Tensor, AtomicUsize);

    impl ImageSource for Stopping {
        fn len(&self) -> usize {
            ImageSource::len(&self.0)
        }

        fn images(&self, indices: &[usize]) -> Result<Tensor, defend_vit::Error> {
            if self.1.fetch_sub(1, Ordering::SeqCst) == 0 {
                return Err(candle_core::Error::Msg("stopped".into()).into());
            }
            self.0.images(indices)
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
            let report = tuner.tune(
                &vit,
                &objective,
                &images(),
                Training::new(&mut rng, &mut |s| {
                    seen.push(s.step);
                    ControlFlow::Continue(())
                }),
            )?;
            assert_eq!(seen, (1..=18).collect::<Vec<_>>());
            Ok((report, vit))
        };
        let (report, vit) = run()?;
        assert!(
            report.losses[5] < 0.8 * report.losses[0],
            "{:?}",
            report.losses
        );
        let (before, after) = (backbone().state_dict()?, vit.state_dict()?);
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
            let run = |stop: usize, checkpoints: Option<&Checkpoints>| -> Result<_, Error> {
                let (vit, config) = (backbone(), small(recipe.clone()));
                let mut rng = Rng::seed(2);
                let objective = PrototypeObjective::random(&config, 32, &mut rng, &Device::Cpu)?;
                let tuner = DenseTuner::new(config)?;
                let images = Stopping(images(), AtomicUsize::new(stop));
                let on_step = &mut |_| ControlFlow::Continue(());
                let training = Training::new(&mut rng, on_step).with_checkpoints(checkpoints);
                let report = tuner.tune(&vit, &objective, &images, training)?;
                let prototypes = objective
                    .parameters()
                    .pop()
                    .map(|(_, var)| var.to_vec2::<f32>());
                Ok((report, prototypes.transpose()?))
            };
            let whole = run(usize::MAX, None)?;
            let losses = &whole.0.losses;
            assert!(losses[5] < 0.9 * losses[0], "{recipe:?}: {losses:?}");
            // Stopped in the midst of an epoch, then resumed.
            let folder = tempfile::tempdir().unwrap();
            let checkpoints =
                Checkpoints::new(folder.path().join("run"), "run").every(Duration::ZERO);
            assert!(run(8, Some(&checkpoints)).is_err());
            assert_eq!(run(usize::MAX, Some(&checkpoints.resuming(true)))?, whole);
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
        let result = tuner.tune(
            &backbone(),
            &objective,
            &none,
            Training::new(&mut rng, &mut |_| ControlFlow::Continue(())),
        );
        assert!(matches!(
            result,
            Err(Error::Train(defend_train::Error::NoImages))
        ));
        let frozen = backbone().copy(TrainScope::Frozen)?;
        assert_eq!(frozen.spec().architecture.depth, 3);
        let result = tuner.tune(
            &frozen,
            &objective,
            &images(),
            Training::new(&mut rng, &mut |_| ControlFlow::Continue(())),
        );
        assert!(matches!(result, Err(Error::FrozenBackbone)));
        let tuner = DenseTuner::new(DenseConfig {
            crop_size: 30,
            ..config()
        })?;
        let result = tuner.tune(
            &backbone(),
            &objective,
            &images(),
            Training::new(&mut rng, &mut |_| ControlFlow::Continue(())),
        );
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
