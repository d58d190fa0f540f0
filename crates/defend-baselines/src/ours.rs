//! This library's method as one system among the others.

use std::sync::Arc;

use defend_core::data::Dataset;
use defend_core::vit::TrainScope;
use defend_core::{Defend, DefendConfig, Error, NoveltyDetector, Observer};
use serde::{Deserialize, Serialize};

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
}

impl Default for Ours {
    fn default() -> Self {
        Self {
            settings: DefendConfig::default(),
            dense: true,
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
        let fitted = builder.config(settings).fit(normal, observer)?;
        Ok(Box::new(fitted.detector))
    }

    fn layers(&self, _depth: usize) -> usize {
        self.settings.distill.layers
    }

    fn name(&self) -> String {
        let dense = if self.tunes() { "DEFEND + " } else { "" };
        format!("{dense}masked distillation")
    }

    fn deviations(&self) -> &'static str {
        "docs/METHOD.md"
    }
}
