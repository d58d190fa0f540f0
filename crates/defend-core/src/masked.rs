//! The student stage by masked knowledge distillation (sections 3.2 and 3.3).

use std::sync::Arc;

use candle_core::{DType, Tensor};
use defend_distill::{DistillObjective, Score, discrepancy};
use defend_vit::Backbone;

use crate::{Error, MaskedConfig, Novelty, PatchMap};

/// A teacher and the student that predicts its features: an image is as novel as the prediction is wrong.
pub(crate) struct MaskedStudent {
    pub(crate) teacher: Arc<dyn Backbone>,
    pub(crate) student: Arc<dyn Backbone>,
    pub(crate) objective: Arc<dyn DistillObjective>,
    pub(crate) score: Arc<dyn Score>,
    /// Roles of custom parts that a model file cannot hold: objective, score.
    pub(crate) custom: Vec<&'static str>,
}

impl MaskedStudent {
    /// The library's own objective and score.
    pub(crate) fn new(
        teacher: Arc<dyn Backbone>,
        student: Arc<dyn Backbone>,
        config: &MaskedConfig,
    ) -> Self {
        Self {
            teacher,
            student,
            objective: Arc::new(config.distill.distance),
            score: Arc::new(config.aggregation),
            custom: Vec::new(),
        }
    }

    /// Scores without verdicts, with maps.
    pub(crate) fn score(
        &self,
        images: &Tensor,
        config: &MaskedConfig,
    ) -> Result<Vec<Novelty>, Error> {
        let found = discrepancy(
            &*self.teacher,
            &*self.student,
            &*self.objective,
            config.distill.layers,
            images,
        )?;
        let scores = self.score.score(&found)?;
        let maps = found.patches.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let results = scores.into_iter().zip(maps).map(|(score, values)| Novelty {
            map: Some(PatchMap {
                grid: found.grid,
                values,
            }),
            ..Novelty::of_score(f64::from(score))
        });
        Ok(results.collect())
    }
}
