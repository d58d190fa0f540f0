//! Settings of the distillation stage.

use defend_train::Schedule;
use serde::{Deserialize, Serialize};

use crate::{Error, FeatureDistance, Mask, Selection};

/// Settings of masked knowledge distillation; the default is the paper's (sections 3.2 and 4.2), with our
/// measured choices where it leaves one open (docs/TRIALS.md).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DistillConfig {
    /// Passes over the images. Paper: 10.
    pub epochs: usize,
    /// Least number of optimiser steps: small sets get more epochs. Ours, since ten epochs of a few
    /// hundred images leave a random student where it began; 0 switches it off.
    pub min_steps: usize,
    /// Images a step.
    #[serde(alias = "batch")]
    pub batch_size: usize,
    /// What the student does not see. Paper: half of the patches.
    pub mask: Mask,
    /// Layers that are compared, counted from the last, each after the final norm; their distances are
    /// averaged. Paper: 1 (Table 1a: 1, 3, 5).
    pub layers: usize,
    /// Distance to the teacher. Paper: eqs. 3 and 4.
    pub distance: FeatureDistance,
    /// Weight of the CLS token's distance in the loss; 0 leaves it out (paper). Ours: 1.
    pub cls_weight: f64,
    /// Peak learning rate. Authors' code: 1e-5, meant for many more steps.
    pub learning_rate: f64,
    /// Learning rate over the steps.
    pub schedule: Schedule,
    /// Decoupled weight decay. Authors' code: 0.05.
    pub weight_decay: f64,
    /// AdamW's betas. Authors' code: 0.9 and 0.95.
    pub betas: [f64; 2],
    /// Largest Euclidean norm of all gradients of a step together; larger ones are scaled down to it. Authors' code: none.
    pub gradient_clip: Option<f64>,
    /// Stochastic depth of the student's last block. Authors' code: 0.1.
    pub drop_path: f64,
    /// Limit of the memory for the teacher's features, bytes. Ours: 2 GiB.
    pub cache_bytes: usize,
}

impl Default for DistillConfig {
    fn default() -> Self {
        Self {
            epochs: 10,
            min_steps: 0,
            batch_size: 32,
            mask: Mask::KeepSalient {
                ratio: 0.5,
                selection: Selection::Sampled,
            },
            layers: 1,
            distance: FeatureDistance::default(),
            cls_weight: 1.0,
            learning_rate: 1e-3,
            schedule: Schedule::Cosine {
                warmup: 0.1,
                floor: 0.01,
            },
            weight_decay: 0.05,
            betas: [0.9, 0.95],
            gradient_clip: None,
            drop_path: 0.1,
            cache_bytes: 2 << 30,
        }
    }
}

impl DistillConfig {
    /// Checks every field's range.
    ///
    /// # Errors
    /// [`Error::Config`] that names the field; [`Error::Train`] for the schedule.
    pub fn validate(&self) -> Result<(), Error> {
        let check = |ok: bool, field, value: String, expected| {
            if ok {
                return Ok(());
            }
            Err(Error::Config {
                field,
                value,
                expected,
            })
        };
        check(
            self.epochs > 0,
            "epochs",
            self.epochs.to_string(),
            "at least 1",
        )?;
        check(
            self.batch_size > 0,
            "batch_size",
            self.batch_size.to_string(),
            "at least 1",
        )?;
        check(
            self.layers > 0,
            "layers",
            self.layers.to_string(),
            "at least 1",
        )?;
        self.distance.validate()?;
        let cls = self.cls_weight;
        let ok = cls.is_finite() && cls >= 0.0;
        check(
            ok,
            "cls_weight",
            cls.to_string(),
            "zero or a positive number",
        )?;
        if let Some(clip) = self.gradient_clip {
            check(
                clip.is_finite() && clip > 0.0,
                "gradient_clip",
                clip.to_string(),
                "a positive number, or none",
            )?;
        }
        let drop = self.drop_path;
        check(
            (0.0..1.0).contains(&drop),
            "drop_path",
            drop.to_string(),
            "a share in 0..1",
        )?;
        self.mask.validate()?;
        Ok(self.schedule.validate()?)
    }

    /// Epochs that a set of `images` is trained for: [`DistillConfig::epochs`], or more to reach
    /// [`DistillConfig::min_steps`].
    pub fn epochs_for(&self, images: usize) -> usize {
        let steps = images.div_ceil(self.batch_size.max(1)).max(1);
        self.epochs.max(self.min_steps.div_ceil(steps))
    }
}
