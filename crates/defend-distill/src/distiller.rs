//! The training stage of masked knowledge distillation.

use candle_core::Tensor;
use defend_nn::Rng;
use defend_train::{
    AdamW, AdamWConfig, ParameterGroup, TensorCache, Training, TrainingPlan, TrainingReport,
    TrainingStage, rows_of, train,
};
use defend_vit::{Backbone, ImageSource, Trainable};

use crate::layers::Layers;
use crate::{DistillConfig, DistillObjective, Error, MaskPolicy};

/// Trains a student to predict a frozen teacher's features from part of each image (section 3.2).
#[derive(Debug, Clone)]
pub struct Distiller {
    config: DistillConfig,
}

/// What takes part in a distillation, each part behind its role.
#[derive(Clone, Copy)]
pub struct DistillRoles<'a> {
    /// The frozen network whose features are predicted.
    pub teacher: &'a dyn Backbone,
    /// The network that predicts them, trained in place.
    pub student: &'a dyn Trainable,
    /// Which patches the student sees.
    pub mask: &'a dyn MaskPolicy,
    /// The distance between prediction and feature.
    pub objective: &'a dyn DistillObjective,
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

    /// Trains the student in place on `images`.
    ///
    /// The teacher sees whole images. What it gives is kept up to the settings' limit of memory: the same image always has the
    /// same features.
    ///
    /// # Errors
    /// Those of [`train`], and what teacher, student, mask and objective return.
    pub fn distill(
        &self,
        roles: DistillRoles<'_>,
        images: &dyn ImageSource,
        training: Training<'_>,
    ) -> Result<TrainingReport, Error> {
        let config = &self.config;
        let plan = TrainingPlan {
            images: images.len(),
            batch_size: config.batch_size,
            epochs: config.epochs_for(images.len()),
        };
        let mut optimiser = optimiser(roles.student, config)?;
        let mut stage = Distillation {
            config,
            roles,
            images,
            targets: TensorCache::new(images.len(), config.cache_bytes),
        };
        train(&mut stage, &mut optimiser, &plan, training)
    }
}

struct Distillation<'a> {
    config: &'a DistillConfig,
    roles: DistillRoles<'a>,
    images: &'a dyn ImageSource,
    /// The teacher's patch tokens, CLS tokens and CLS attention.
    targets: TensorCache<3>,
}

impl TrainingStage for Distillation<'_> {
    type Error = Error;

    fn prefetch(&self, order: &[usize]) {
        self.images.prefetch(order);
    }

    fn loss(&mut self, indices: &[usize], rng: &mut Rng) -> Result<Tensor, Error> {
        let DistillRoles {
            teacher,
            student,
            mask,
            objective,
        } = self.roles;
        let layers = self.config.layers;
        let batch = self.images.images(indices)?;
        let [patches, cls, attention] = self.targets.batch(indices, |missing| {
            let features = teacher.features(&rows_of(&batch, indices, missing)?)?;
            let attention = features.cls_attention.mean(1)?;
            let layers = Layers::from_features(&features, layers)?;
            Ok::<_, Error>([layers.patches.detach(), layers.cls.detach(), attention])
        })?;
        let grid = student_grid(student, &batch)?;
        let keep = mask.keep(&attention, grid, rng)?;
        let predicted = student.features_train(&batch, keep.as_ref(), rng)?;
        let predicted = Layers::from_features(&predicted, layers)?;
        let patches = match &keep {
            Some(keep) => Layers::keep(&patches, keep)?,
            None => patches,
        };
        let loss = objective
            .distances(&patches, &predicted.patches)?
            .mean_all()?;
        if self.config.cls_weight > 0.0 {
            let cls = objective.distances(&cls, &predicted.cls)?.mean_all()?;
            return Ok((loss + (cls * self.config.cls_weight)?)?);
        }
        Ok(loss)
    }

    fn schedule(&self, _: &mut AdamW, step: usize, steps: usize) -> Result<f64, Error> {
        Ok(self.config.schedule.multiplier(step, steps))
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
        gradient_clip: config.gradient_clip,
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
    use std::ops::ControlFlow;

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

    fn distil(
        config: DistillConfig,
        teacher: &Vit,
        student: &Vit,
    ) -> Result<TrainingReport, Error> {
        let (mask, distance) = (config.mask, config.distance);
        let roles = DistillRoles {
            teacher,
            student,
            mask: &mask,
            objective: &distance,
        };
        let distiller = Distiller::new(config)?;
        let (images, rng) = (images(0.0), &mut Rng::seed(3));
        distiller.distill(
            roles,
            &images,
            Training::new(rng, &mut |_| ControlFlow::Continue(())),
        )
    }

    fn trained(mask: Mask) -> Result<(TrainingReport, Vit), Error> {
        let config = DistillConfig {
            epochs: 10,
            min_steps: 60,
            batch_size: 5,
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
            let (report, _) = trained(mask)?;
            assert_eq!((report.losses.len(), report.steps), (20, 60));
            let (first, last) = (report.losses[0], report.losses[19]);
            assert!(
                last < 0.7 * first,
                "{mask:?}: loss went from {first} to {last}"
            );
            assert_eq!(report, trained(mask)?.0);
        }
        Ok(())
    }

    #[test]
    fn images_unlike_the_training_images_score_higher() -> Result<(), Error> {
        let (_, student) = trained(Mask::Random { ratio: 0.5 })?;
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
                batch_size: 5,
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
