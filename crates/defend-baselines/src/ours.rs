//! This library's method as one system among the others.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use defend_core::data::Dataset;
use defend_core::distill::{self, Discrepancy, Score};
use defend_core::nn::ops::l2_normalize;
use defend_core::vit::{Arithmetic, ImageSource, TrainScope};
use defend_core::{Defend, DefendConfig, Error, NoveltyDetector, Observer};
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
            // Nothing changes the teacher: its features may come from the cache.
            None if settings.arithmetic == Arithmetic::F32 => {
                builder.own_teacher(teacher.backbone(settings.distill.layers)?)
            }
            _ => builder.teacher(teacher.vit().copy(TrainScope::Frozen)?),
        };
        let fitted = builder
            .config(settings)
            .fit(Arc::clone(&normal), observer)?;
        if !self.whitened {
            return Ok(Box::new(fitted.detector));
        }
        let pictures = teacher.read(normal, observer)?;
        let indices: Vec<usize> = (0..pictures.len()).collect();
        let (teacher, student) = (fitted.detector.teacher(), fitted.detector.student());
        let mut errors = Vec::with_capacity(indices.len());
        for batch in indices.chunks(BATCH) {
            let images = pictures.images(batch)?;
            let tokens = [
                teacher.features(&images)?.cls,
                student.features(&images)?.cls,
            ];
            errors.extend(cls_errors(&tokens)?);
        }
        let score = Whitened(Gaussian::fit(&errors)?);
        Ok(Box::new(fitted.detector.with_score(Arc::new(score))))
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

/// Scores by the distribution of the errors at the CLS token.
struct Whitened(Gaussian);

/// Difference of the normalised CLS tokens of teacher and student, one row an image.
fn cls_errors([teacher, student]: &[Tensor; 2]) -> Result<Vec<Vec<f32>>, distill::Error> {
    let [teacher, student] = [teacher, student].map(|t| l2_normalize(&t.to_dtype(DType::F32)?));
    let difference = (teacher? - student?)?;
    Ok(difference.detach().to_vec2()?)
}

impl Score for Whitened {
    fn score(&self, discrepancy: &Discrepancy) -> Result<Vec<f32>, distill::Error> {
        let errors = cls_errors(&discrepancy.cls_tokens)?;
        Ok(errors.iter().map(|error| self.0.distance(error)).collect())
    }
}
