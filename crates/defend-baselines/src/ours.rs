//! This library's method as one system among the others.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use defend_core::data::{Dataset, Preprocess};
use defend_core::nn::ops::l2_normalize;
use defend_core::vit::{ImageSource, TrainScope};
use defend_core::{Defend, DefendConfig, Detector, Error, Novelty, NoveltyDetector, Observer};
use serde::{Deserialize, Serialize};

use crate::gaussian::Gaussian;
use crate::system::BATCH;
use crate::{System, Teacher};

/// Dense fine-tuning and masked distillation with any settings: leave the dense stage out, take another mask, another
/// distance, another score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ours {
    /// Settings; seed, image size and fit are those of the benchmark.
    pub settings: DefendConfig,
    /// Whether the dense stage runs: the same as `settings.dense = null`, for formats without a null such as TOML.
    pub dense: bool,
    /// Whether the score is the squared Mahalanobis distance of the student's error at the CLS token among its errors on
    /// the training images, in place of `settings.aggregation`.
    pub whitened: bool,
}

impl Default for Ours {
    fn default() -> Self {
        Self {
            settings: DefendConfig::default(),
            dense: true,
            whitened: false,
        }
    }
}

impl Ours {
    fn tunes(&self) -> bool {
        self.dense && self.settings.dense.is_some()
    }
}

impl System for Ours {
    fn fit(
        &self,
        teacher: &Teacher,
        normal: Arc<dyn Dataset>,
        seed: u64,
        observer: &mut dyn Observer,
    ) -> Result<Box<dyn NoveltyDetector>, Error> {
        let settings = DefendConfig {
            seed,
            fit: teacher.preprocess().fit,
            image_size: None,
            dense: self.settings.dense.clone().filter(|_| self.dense),
            ..self.settings.clone()
        };
        let builder = Defend::builder()
            .device(teacher.device().clone())
            .strict(true);
        let builder = match &settings.dense {
            // Nothing trains the teacher: its features may come from the cache.
            None => builder.own_teacher(teacher.backbone(settings.distill.layers)?),
            Some(_) => builder.teacher(teacher.vit().copy(TrainScope::Frozen)?),
        };
        let fitted = builder
            .config(settings)
            .fit(Arc::clone(&normal), observer)?;
        if !self.whitened {
            return Ok(Box::new(fitted.detector));
        }
        let pictures = teacher.read(normal, observer)?;
        let indices: Vec<usize> = (0..pictures.len()).collect();
        let mut errors = Vec::with_capacity(indices.len());
        for batch in indices.chunks(BATCH) {
            errors.extend(cls_errors(&fitted.detector, &pictures.images(batch)?)?);
        }
        Ok(Box::new(Whitened {
            errors: Gaussian::fit(&errors)?,
            detector: fitted.detector,
        }))
    }

    fn layers(&self, _depth: usize) -> usize {
        self.settings.distill.layers
    }

    fn name(&self) -> String {
        let dense = if self.tunes() { "DEFEND + " } else { "" };
        let whitened = if self.whitened { ", whitened" } else { "" };
        format!("{dense}masked distillation{whitened}")
    }

    fn deviations(&self) -> &'static str {
        "docs/METHOD.md"
    }
}

/// A detector that scores by the distribution of its errors.
struct Whitened {
    detector: Detector,
    errors: Gaussian,
}

/// Difference of the normalised CLS tokens of teacher and student, one row an image.
fn cls_errors(detector: &Detector, images: &Tensor) -> Result<Vec<Vec<f32>>, Error> {
    let teacher = l2_normalize(&detector.teacher().features(images)?.cls)?;
    let student = l2_normalize(&detector.student().features(images)?.cls)?;
    Ok((teacher - student)?.detach().to_vec2()?)
}

impl NoveltyDetector for Whitened {
    fn preprocess(&self) -> &Preprocess {
        self.detector.preprocess()
    }

    fn device(&self) -> &Device {
        self.detector.device()
    }

    fn score(&self, images: &Tensor) -> Result<Vec<Novelty>, Error> {
        let mut found = self.detector.score(images)?;
        let errors = cls_errors(&self.detector, images)?;
        for (novelty, error) in found.iter_mut().zip(errors) {
            novelty.score = self.errors.distance(&error);
        }
        Ok(found)
    }
}
