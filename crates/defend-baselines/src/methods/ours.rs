//! This library's method as one method among the others.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use defend_core::data::Dataset;
use defend_core::distill::{self, Discrepancy, Score};
use defend_core::nn::ops::l2_normalize;
use defend_core::vit::{ComputePrecision, ImageSource, TrainScope};
use defend_core::{Defend, DefendConfig, Error, MaskedConfig, NoveltyDetector, Observer, Recipe};
use serde::{Deserialize, Serialize};

use crate::components::gaussian::Gaussian;
use crate::method::BATCH;
use crate::{Method, Teacher};

/// This library's method: a recipe, or any settings.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ours {
    /// The recipe.
    pub recipe: Recipe,
    /// Settings in place of a recipe's; seed and resize mode are those of the benchmark. With an image size of its own a method needs its
    /// background as photos.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub settings: Option<DefendConfig>,
    /// Whether a masked student's score is the squared Mahalanobis distance of its error at the CLS token among its errors on
    /// the training images, in place of its aggregation.
    pub whitened: bool,
}

impl Ours {
    fn config(&self) -> DefendConfig {
        self.settings
            .clone()
            .unwrap_or_else(|| self.recipe.config())
    }
}

impl Method for Ours {
    fn fit(
        &self,
        teacher: &Teacher,
        normal: Arc<dyn Dataset>,
        seed: u64,
        observer: &mut dyn Observer,
    ) -> Result<Box<dyn NoveltyDetector>, Error> {
        let settings = DefendConfig {
            seed,
            resize_mode: teacher.preprocess().resize_mode,
            ..self.config()
        };
        if settings.region.is_some() {
            return Err(Error::Config {
                field: "region",
                value: "set".into(),
                expected: "null: masks, boxes and pages of a benchmark are of whole images".into(),
            });
        }
        let layers = settings
            .masked_student()
            .map_or(1, |masked| masked.distill.layers);
        let mut builder = Defend::builder()
            .device(teacher.device().clone())
            .strict(true);
        if settings.masked_student().is_none() {
            builder = builder.background(teacher.background().clone());
        }
        let builder = match &settings.dense {
            // Nothing changes the teacher: its features may come from the cache.
            None if settings.compute_precision == ComputePrecision::F32
                && settings.image_size.is_none()
                && settings.tiles.is_none() =>
            {
                builder.teacher(teacher.backbone(layers)?)
            }
            _ => builder.teacher(teacher.vit().copy(TrainScope::Frozen)?),
        };
        let fitted = builder
            .config(settings)
            .fit(Arc::clone(&normal), observer)?;
        if !self.whitened {
            return Ok(Box::new(fitted.detector));
        }
        let Some((backbone, student)) = fitted.detector.networks() else {
            return Err(Error::Config {
                field: "whitened",
                value: "true".into(),
                expected: "false for the closed form, which knows the spread of its values".into(),
            });
        };
        let images = teacher.read_as(normal, fitted.detector.preprocess(), observer)?;
        let indices: Vec<usize> = (0..images.len()).collect();
        let mut errors = Vec::with_capacity(indices.len());
        for batch in indices.chunks(BATCH) {
            let images = images.images(batch)?;
            let tokens = [
                backbone.features(&images)?.cls,
                student.features(&images)?.cls,
            ];
            errors.extend(cls_errors(&tokens)?);
        }
        let score = Whitened(Gaussian::fit(&errors)?);
        Ok(Box::new(fitted.detector.with_score(Arc::new(score))?))
    }

    fn layers(&self, _depth: usize) -> usize {
        let config = self.config();
        config
            .masked_student()
            .map_or(1, |masked| masked.distill.layers)
    }

    fn name(&self) -> String {
        let config = self.config();
        let tuned = config.dense.is_some();
        let Some(masked) = config.masked_student() else {
            return if tuned {
                "DEFEND + closed form"
            } else {
                "closed form"
            }
            .into();
        };
        if tuned && *masked == MaskedConfig::paper() {
            return "paper".into();
        }
        let dense = if tuned { "DEFEND + " } else { "" };
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
