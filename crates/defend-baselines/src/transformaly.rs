//! Transformaly (Cohen and Avidan, 2022): the density of pretrained features and of a student's errors, together.

use std::sync::Arc;

use candle_core::{D, Device, Tensor};
use defend_core::data::{Dataset, Preprocess};
use defend_core::distill::{
    DistillConfig, Distiller, FeatureDistance, FeatureNorm, Mask, NormalizedSide, Penalty,
};
use defend_core::nn::Rng;
use defend_core::vit::{Backbone, Features, TrainScope, Vit};
use defend_core::{Error, Event, Novelty, NoveltyDetector, Observer, Stage};
use serde::{Deserialize, Serialize};

use crate::gaussian::{Gaussian, Regularization};
use crate::scored::unmapped;
use crate::system::BATCH;
use crate::{System, Teacher};

/// A student that sees whole images learns the teacher's last blocks; the score is the sum of two squared
/// Mahalanobis distances, of the pretrained CLS token and of the blocks' errors.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Transformaly {
    /// Blocks that are compared, counted from the last, at most those there are. Paper: 10.
    pub layers: usize,
    /// Passes over the images.
    pub epochs: usize,
    /// Images a step.
    pub batch: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
}

impl Default for Transformaly {
    fn default() -> Self {
        Self {
            layers: 10,
            epochs: 10,
            batch: 32,
            learning_rate: 1e-3,
        }
    }
}

struct TwoSpaces {
    teacher: Arc<dyn Backbone>,
    student: Vit,
    layers: usize,
    pretrained: Gaussian,
    errors: Gaussian,
    preprocess: Preprocess,
    device: Device,
}

/// Mean squared difference of teacher and student in each block, `[B, L]`.
fn block_errors(teacher: &Features, student: &Features, layers: usize) -> Result<Tensor, Error> {
    let error = |t: &Tensor, s: &Tensor| (t - s)?.sqr()?.mean((1, 2));
    let mut errors = vec![error(&teacher.patches, &student.patches)?];
    let earlier = teacher.earlier.iter().zip(&student.earlier);
    for (t, s) in earlier.take(layers - 1) {
        errors.push(error(&t.patches, &s.patches)?);
    }
    Ok(Tensor::stack(&errors, D::Minus1)?.detach())
}

impl NoveltyDetector for TwoSpaces {
    fn preprocess(&self) -> &Preprocess {
        &self.preprocess
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn score(&self, images: &Tensor) -> Result<Vec<Novelty>, Error> {
        let features = self.teacher.features(images)?;
        let errors = block_errors(&features, &self.student.features(images)?, self.layers)?;
        let rows = errors.to_vec2::<f32>()?.into_iter();
        let pairs = features.cls.to_vec2::<f32>()?.into_iter().zip(rows);
        let score = |(cls, errors): (Vec<f32>, Vec<f32>)| {
            self.pretrained.distance(&cls) + self.errors.distance(&errors)
        };
        Ok(unmapped(pairs.map(score).collect()))
    }
}

impl System for Transformaly {
    fn fit(
        &self,
        teacher: &Teacher,
        normal: Arc<dyn Dataset>,
        seed: u64,
        observer: &mut dyn Observer,
    ) -> Result<Box<dyn NoveltyDetector>, Error> {
        let layers = self.layers.min(teacher.depth());
        let backbone = teacher.backbone(layers)?;
        let pictures = teacher.read(normal, observer)?;
        let images = defend_core::vit::ImageSource::len(&pictures);
        let config = DistillConfig {
            epochs: self.epochs,
            batch: self.batch,
            mask: Mask::None,
            layers,
            cls_weight: 0.0,
            learning_rate: self.learning_rate,
            distance: FeatureDistance {
                norm: FeatureNorm::None,
                side: NormalizedSide::Both,
                penalty: Penalty::Squared,
            },
            ..DistillConfig::default()
        };
        let mut rng = Rng::seed(seed);
        let spec = backbone.spec().clone();
        let student = Vit::random(spec, config.drop_path, &mut rng, teacher.device())?;
        let (mask, distance) = (config.mask, config.distance);
        let stage = Stage::Distill;
        observer.on(&Event::Started {
            stage,
            images: (config.epochs_for(images) * images) as u64,
        });
        Distiller::new(config)?.distill(
            &*backbone,
            &student,
            &mask,
            &distance,
            &pictures,
            &mut rng,
            &mut |step| {
                observer.on(&Event::Advanced {
                    images: step.images as u64,
                    loss: Some(step.loss),
                });
            },
        )?;
        observer.on(&Event::Finished { stage });
        let student = student.copy(TrainScope::Frozen)?.with_layers(layers)?;

        let (mut cls, mut errors) = (Vec::new(), Vec::new());
        let indices: Vec<usize> = (0..images).collect();
        for batch in indices.chunks(BATCH) {
            let batch = defend_core::vit::ImageSource::images(&pictures, batch)?;
            let features = backbone.features(&batch)?;
            let found = block_errors(&features, &student.features(&batch)?, layers)?;
            errors.extend(found.to_vec2::<f32>()?);
            cls.extend(features.cls.to_vec2::<f32>()?);
        }
        Ok(Box::new(TwoSpaces {
            pretrained: Gaussian::fit(&cls, Regularization::LedoitWolf)?,
            errors: Gaussian::fit(&errors, Regularization::LedoitWolf)?,
            teacher: backbone,
            student,
            layers,
            preprocess: teacher.preprocess().clone(),
            device: teacher.device().clone(),
        }))
    }

    fn layers(&self, depth: usize) -> usize {
        self.layers.min(depth)
    }

    fn name(&self) -> String {
        "Transformaly".into()
    }

    fn deviations(&self) -> &'static str {
        "one student from the image to the last block, not block by block on the teacher's tokens; blocks compared after the final norm, patch tokens only; AdamW with a cosine schedule; Ledoit and Wolf's \
         covariances in place of whitening"
    }
}
