//! The training loop of masked knowledge distillation.

use candle_core::{DType, Tensor};
use defend_nn::{
    AdamW, AdamWConfig, ParameterGroup, Rng, TensorCache, TrainingStep, backward, release_memory,
    rows_of, shuffled_batches,
};
use defend_vit::{Backbone, ImageSource, Trainable};

use crate::layers::Layers;
use crate::{DistillConfig, DistillObjective, Error, MaskPolicy};

/// Trains a student to predict a frozen teacher's features from part of each image (section 3.2).
#[derive(Debug, Clone)]
pub struct Distiller {
    config: DistillConfig,
}

/// What a run of the distiller did.
#[derive(Debug, Clone, PartialEq)]
pub struct DistillReport {
    /// Mean loss of each epoch, first epoch first.
    pub losses: Vec<f64>,
    /// Steps taken.
    pub steps: usize,
}

impl Distiller {
    /// A distiller with checked settings.
    ///
    /// # Errors
    /// [`Error::Config`] that names the field.
    pub fn new(config: DistillConfig) -> Result<Self, Error> {
        config.validate()?;
        Ok(Self { config })
    }

    /// Trains `student` in place; `on_step` hears of every step.
    ///
    /// The teacher sees whole images, once: without augmentation its features and attention are constant.
    ///
    /// # Errors
    /// [`Error::NoImages`], [`Error::Diverged`], and what teacher, student, mask and objective return.
    #[allow(clippy::too_many_arguments)] // the four roles of the stage, its images, and the run's two handles
    pub fn distill(
        &self,
        teacher: &dyn Backbone,
        student: &dyn Trainable,
        mask: &dyn MaskPolicy,
        objective: &dyn DistillObjective,
        images: &dyn ImageSource,
        rng: &mut Rng,
        on_step: &mut dyn FnMut(TrainingStep),
    ) -> Result<DistillReport, Error> {
        let config = &self.config;
        if images.is_empty() {
            return Err(Error::NoImages);
        }
        let mut optimiser = optimiser(student, config)?;
        let mut targets = TensorCache::<3>::new(images.len(), config.cache_bytes);
        let epochs = config.epochs_for(images.len());
        let steps = epochs * images.len().div_ceil(config.batch);
        let mut losses = Vec::with_capacity(epochs);
        for epoch in 0..epochs {
            let mut total = 0.0;
            let batches = shuffled_batches(images.len(), config.batch, rng);
            images.announce(&batches.concat());
            for indices in batches {
                let batch = images.images(&indices)?;
                let [patches, cls, attention] = targets.batch(&indices, |missing| {
                    let features = teacher.features(&rows_of(&batch, &indices, missing)?)?;
                    let attention = features.cls_attention.mean(1)?;
                    let layers = Layers::of(&features, config.layers)?;
                    Ok::<_, Error>([layers.patches.detach(), layers.cls.detach(), attention])
                })?;
                let grid = student_grid(student, &batch)?;
                let keep = mask.keep(&attention, grid, rng)?;
                let predicted = student.training_features(&batch, keep.as_ref(), rng)?;
                let predicted = Layers::of(&predicted, config.layers)?;
                let patches = match &keep {
                    Some(keep) => Layers::keep(&patches, keep)?,
                    None => patches,
                };
                let mut loss = objective
                    .distances(&patches, &predicted.patches)?
                    .mean_all()?;
                if config.cls_weight > 0.0 {
                    let cls = objective.distances(&cls, &predicted.cls)?.mean_all()?;
                    loss = (loss + (cls * config.cls_weight)?)?;
                }
                let value = f64::from(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?);
                if !value.is_finite() {
                    return Err(Error::Diverged {
                        step: optimiser.steps(),
                        loss: value,
                    });
                }
                let multiplier = config.schedule.multiplier(optimiser.steps(), steps);
                optimiser.step(&backward(&loss)?, multiplier)?;
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
        release_memory();
        Ok(DistillReport { losses, steps })
    }
}

/// Weight matrices decay; biases, norms, tokens and positions do not.
fn optimiser(student: &dyn Trainable, config: &DistillConfig) -> Result<AdamW, Error> {
    let (matrices, vectors) = student.parameters().into_iter().partition(|(name, var)| {
        var.rank() > 1 && !name.ends_with("_token") && name != "pos_embed"
    });
    let group = |parameters, weight_decay| ParameterGroup {
        parameters,
        learning_rate: config.learning_rate,
        weight_decay,
    };
    let groups = vec![group(matrices, config.weight_decay), group(vectors, 0.0)];
    let [beta1, beta2] = config.betas;
    let constants = AdamWConfig {
        beta1,
        beta2,
        ..AdamWConfig::default()
    };
    Ok(AdamW::new(groups, constants)?)
}

fn student_grid(student: &dyn Backbone, batch: &Tensor) -> Result<defend_vit::Grid, Error> {
    let (_, _, height, width) = batch.dims4()?;
    let patch = student.spec().architecture.patch_size;
    Ok(defend_vit::Grid {
        rows: height / patch,
        columns: width / patch,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Aggregation, FeatureDistance, Mask, Score, Selection, discrepancy};
    use candle_core::Device;
    use defend_vit::{Architecture, BackboneSpec, Vit};

    fn vit(seed: u64) -> Vit {
        let architecture = Architecture {
            image_size: 32,
            patch_size: 8,
            width: 24,
            depth: 2,
            heads: 2,
            mlp_width: 48,
            ..Architecture::vit_tiny()
        };
        Vit::random(
            BackboneSpec::new(architecture),
            0.1,
            &mut Rng::seed(seed),
            &Device::Cpu,
        )
        .unwrap()
    }

    fn images(phase: f32) -> Tensor {
        let values: Vec<f32> = (0..12 * 3 * 32 * 32)
            .map(|i| (i as f32 * 0.05 + phase * (i % 7) as f32).sin())
            .collect();
        Tensor::from_vec(values, (12, 3, 32, 32), &Device::Cpu).unwrap()
    }

    fn distil(config: DistillConfig, teacher: &Vit, student: &Vit) -> Result<DistillReport, Error> {
        let (mask, distance) = (config.mask, config.distance);
        let (images, rng) = (images(0.0), &mut Rng::seed(3));
        let distiller = Distiller::new(config)?;
        distiller.distill(
            teacher,
            student,
            &mask,
            &distance,
            &images,
            rng,
            &mut |_| (),
        )
    }

    fn train(mask: Mask) -> Result<(DistillReport, Vit), Error> {
        let config = DistillConfig {
            epochs: 10,
            min_steps: 60,
            batch: 5,
            cls_weight: 1.0,
            learning_rate: 3e-3,
            mask,
            ..DistillConfig::default()
        };
        let student = vit(2);
        Ok((distil(config, &vit(1), &student)?, student))
    }

    #[test]
    fn every_mask_trains_and_repeats_bit_for_bit() -> Result<(), Error> {
        let (ratio, selection) = (0.5, Selection::Sampled);
        for mask in [
            Mask::None,
            Mask::Random { ratio },
            Mask::KeepSalient { ratio, selection },
            Mask::HideSalient {
                ratio,
                selection: Selection::TopK,
            },
        ] {
            let (report, _) = train(mask)?;
            assert_eq!((report.losses.len(), report.steps), (20, 60));
            let (first, last) = (report.losses[0], report.losses[19]);
            assert!(
                last < 0.7 * first,
                "{mask:?}: loss went from {first} to {last}"
            );
            assert_eq!(report, train(mask)?.0);
        }
        Ok(())
    }

    #[test]
    fn images_unlike_the_training_images_score_higher() -> Result<(), Error> {
        let (_, student) = train(Mask::Random { ratio: 0.5 })?;
        let (teacher, distance) = (vit(1), FeatureDistance::default());
        let score = |images: &Tensor| -> Result<f32, Error> {
            let d = discrepancy(&teacher, &student, &distance, 1, images)?;
            assert_eq!((d.patches.dims(), d.cls.dims()), (&[12, 16][..], &[12][..]));
            let scores = Aggregation::Mean.score(&d)?;
            Ok(scores.iter().sum::<f32>() / scores.len() as f32)
        };
        let (seen, novel) = (score(&images(0.0))?, score(&images(1.0))?);
        assert!(novel > 1.3 * seen, "seen {seen}, novel {novel}");
        Ok(())
    }

    #[test]
    fn two_layers_train_and_more_than_there_are_are_refused() -> Result<(), Error> {
        let run = |layers: usize| -> Result<_, Error> {
            let config = DistillConfig {
                epochs: 15,
                batch: 5,
                layers,
                learning_rate: 3e-3,
                ..DistillConfig::default()
            };
            let (teacher, student) = (vit(1).with_layers(2)?, vit(2).with_layers(2)?);
            let distance = config.distance;
            Ok((
                distil(config, &teacher, &student)?,
                discrepancy(&teacher, &student, &distance, layers, &images(0.0))?,
            ))
        };
        let (report, found) = run(2)?;
        assert!(
            report.losses[14] < 0.8 * report.losses[0],
            "{:?}",
            report.losses
        );
        assert_eq!(
            (found.patches.dims(), found.cls.dims()),
            (&[12, 16][..], &[12][..])
        );
        assert!(matches!(
            run(3),
            Err(Error::Config {
                field: "layers",
                ..
            })
        ));
        Ok(())
    }
}
