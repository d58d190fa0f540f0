//! Settings of a whole fit.

use defend_data::Fit;
use defend_dense::DenseConfig;
use defend_distill::{Aggregation, DistillConfig};
use defend_vit::Arithmetic;
use serde::{Deserialize, Serialize};

use crate::Error;

/// Settings of a whole fit; saved with the model.
///
/// The default is the paper's method with the CLS token learnt and scored beside the patches, which measured
/// better on every class we tried (docs/RESULTS.md); [`DefendConfig::paper`] leaves that out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DefendConfig {
    /// Seed of every random choice: same seed, same bits.
    pub seed: u64,
    /// How pictures become square. Squash keeps every object in the picture.
    pub fit: Fit,
    /// Side that pictures are resized to, pixels; a multiple of the patch size. `None`: the size that the teacher
    /// was trained at. DINOv2 checkpoints say 518 and work at 224 in a seventh of the time.
    pub image_size: Option<usize>,
    /// Dense fine-tuning of the teacher; `None` leaves the teacher as it was pretrained.
    pub dense: Option<DenseConfig>,
    /// Masked knowledge distillation.
    pub distill: DistillConfig,
    /// How patch distances become a score.
    pub aggregation: Aggregation,
    /// Images a forward pass when scoring; has no influence on the scores.
    pub batch: usize,
    /// How the frozen teacher computes, and the student once it is trained. `bf16` is faster on GPUs and on processors with AMX,
    /// meant to be on those with AVX-512 BF16 (docs/PERFORMANCE.md), and model files take half the space. Networks of one's own stay as they are.
    pub arithmetic: Arithmetic,
}

impl Default for DefendConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            fit: Fit::Squash,
            image_size: None,
            dense: Some(DenseConfig::default()),
            distill: DistillConfig::default(),
            aggregation: Aggregation::PatchesAndCls { weight: 1.0 },
            batch: 32,
            arithmetic: Arithmetic::F32,
        }
    }
}

impl DefendConfig {
    /// The paper's loss and score: patch tokens alone, and their mean distance (section 3.3).
    pub fn paper() -> Self {
        Self {
            distill: DistillConfig {
                cls_weight: 0.0,
                ..DistillConfig::default()
            },
            aggregation: Aggregation::Mean,
            ..Self::default()
        }
    }

    /// Checks every field and that the stages fit each other.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Dense`] or [`Error::Distill`] naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        if let Some(dense) = &self.dense {
            dense.validate()?;
        }
        self.distill.validate()?;
        self.aggregation.validate()?;
        if self.batch == 0 {
            return Err(Error::Config {
                field: "batch",
                value: "0".into(),
                expected: "at least 1".into(),
            });
        }
        if self.aggregation.uses_cls() && self.distill.cls_weight == 0.0 {
            return Err(Error::Config {
                field: "aggregation",
                value: format!("{:?}", self.aggregation),
                expected: "distill.cls_weight above 0, so that the student learns the CLS token"
                    .into(),
            });
        }
        Ok(())
    }
}
