//! Settings of a whole fit.

use defend_data::{Region, ResizeMode};
use defend_dense::DenseConfig;
use defend_distill::{Aggregation, DistillConfig};
use defend_evidence::EvidenceConfig;
use defend_vit::ComputePrecision;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use crate::{Error, Tiles};

/// Settings of a whole fit; saved with the model.
///
/// The default is the closed form on an untouched teacher. [`Recipe`] has the others, the paper's among them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, try_from = "Written")]
pub struct DefendConfig {
    /// Seed of every random choice: same seed, same bits.
    pub seed: u64,
    /// How images become square. Squash keeps every object in the image.
    #[serde(alias = "fit")]
    pub resize_mode: ResizeMode,
    /// Side that images are resized to, pixels; a multiple of the patch size. `None`: the size that the teacher
    /// was trained at. DINOv2 checkpoints say 518 and work at 224 in a seventh of the time.
    pub image_size: Option<usize>,
    /// Whether large JPEGs are decoded at a part of their size, at least twice the size that they are resized to: about 60 % of the
    /// time. Scores change by little (docs/PERFORMANCE.md).
    pub reduced_decoding: bool,
    /// What is looked at of each image; all of it without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<Region>,
    /// Large images in tiles, for small faults; the closed form on an untuned teacher has them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tiles: Option<Tiles>,
    /// Dense fine-tuning of the teacher; `None` leaves the teacher as it was pretrained.
    pub dense: Option<DenseConfig>,
    /// What learns the normal images from the teacher's features.
    pub student: Student,
    /// Share of normal images that the threshold of a fit calls novel, about: it is the quantile of left-out values, which
    /// the closed form has. [`crate::Detector::calibrate`] takes it from held-out images.
    pub false_alarm_rate: f64,
    /// Images a forward pass when scoring; has no influence on the scores.
    #[serde(alias = "batch")]
    pub batch_size: usize,
    /// How the frozen teacher computes, and the student once it is trained. `bf16` is faster on GPUs and on processors with AMX,
    /// meant to be on those with AVX-512 BF16 (docs/PERFORMANCE.md), and model files take half the space. Custom networks stay as they are.
    #[serde(alias = "arithmetic")]
    pub compute_precision: ComputePrecision,
}

/// The student stage: what learns the normal images from the teacher's features.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Student {
    /// An infinitely wide student in closed form, with the contrast to ordinary photos and the patch memory: no training.
    ClosedForm(EvidenceConfig),
    /// A student trained by masked knowledge distillation (paper, section 3.2).
    Masked(MaskedConfig),
}

/// Settings of the masked student; the default learns and scores the CLS token beside the patches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MaskedConfig {
    /// Masked knowledge distillation.
    pub distill: DistillConfig,
    /// How patch distances become a score.
    pub aggregation: Aggregation,
}

impl Default for MaskedConfig {
    fn default() -> Self {
        Self {
            distill: DistillConfig::default(),
            aggregation: Aggregation::PatchesAndCls { weight: 1.0 },
        }
    }
}

impl MaskedConfig {
    /// The paper's loss and score: patch tokens alone, and their mean distance (section 3.3).
    pub fn paper() -> Self {
        Self {
            distill: DistillConfig {
                cls_weight: 0.0,
                ..DistillConfig::default()
            },
            aggregation: Aggregation::Mean,
        }
    }

    fn validate(&self) -> Result<(), Error> {
        self.distill.validate()?;
        self.aggregation.validate()?;
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

/// Settings by name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recipe {
    /// The closed form on an untouched teacher: nothing is trained.
    #[default]
    Default,
    /// The paper: dense fine-tuning, masked distillation of patches, their mean distance as score.
    Paper,
    /// As the paper, with the CLS token learnt and scored beside the patches.
    Masked,
    /// `masked` with the dense stage of the authors' script.
    OfficialDense,
    /// `masked` with the dense stage of the authors' second script, in the style of Leopart.
    OfficialLeopart,
}

impl Recipe {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Default,
        Self::Paper,
        Self::Masked,
        Self::OfficialDense,
        Self::OfficialLeopart,
    ];

    /// The settings.
    pub fn config(self) -> DefendConfig {
        let masked = |dense, masked| DefendConfig {
            dense: Some(dense),
            student: Student::Masked(masked),
            ..DefendConfig::default()
        };
        match self {
            Self::Default => DefendConfig::default(),
            Self::Paper => masked(DenseConfig::default(), MaskedConfig::paper()),
            Self::Masked => masked(DenseConfig::default(), MaskedConfig::default()),
            Self::OfficialDense => masked(DenseConfig::official_dense(), MaskedConfig::default()),
            Self::OfficialLeopart => {
                masked(DenseConfig::official_leopart(), MaskedConfig::default())
            }
        }
    }
}

impl Default for DefendConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            resize_mode: ResizeMode::Squash,
            image_size: None,
            reduced_decoding: true,
            region: None,
            tiles: None,
            dense: None,
            student: Student::ClosedForm(EvidenceConfig::default()),
            false_alarm_rate: 0.05,
            batch_size: 32,
            compute_precision: ComputePrecision::F32,
        }
    }
}

impl DefendConfig {
    /// The paper's pipeline: [`Recipe::Paper`].
    pub fn paper() -> Self {
        Recipe::Paper.config()
    }

    /// The paper's pipeline with the CLS token learnt and scored too: [`Recipe::Masked`].
    pub fn masked() -> Self {
        Recipe::Masked.config()
    }

    /// Settings of the masked student, where it is one.
    pub fn masked_student(&self) -> Option<&MaskedConfig> {
        match &self.student {
            Student::Masked(masked) => Some(masked),
            Student::ClosedForm(_) => None,
        }
    }

    /// Checks every field and that the stages fit each other.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Dense`], [`Error::Distill`] or [`Error::Evidence`] naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        if let Some(dense) = &self.dense {
            dense.validate()?;
        }
        if let Some(region) = &self.region {
            region.validate()?;
        }
        if let Some(tiles) = &self.tiles {
            tiles.validate()?;
            let fault = |expected: &str| {
                Err(Error::Config {
                    field: "tiles",
                    value: format!("{}x{}", tiles.columns, tiles.rows),
                    expected: expected.into(),
                })
            };
            if self.dense.is_some() || self.masked_student().is_some() {
                return fault("null, or a closed-form student on a teacher that is not tuned");
            }
            if self.resize_mode != ResizeMode::Squash {
                return fault("null, or resize_mode = squash: tiles are cut from the whole image");
            }
        }
        match &self.student {
            Student::ClosedForm(evidence) => evidence.validate()?,
            Student::Masked(masked) => masked.validate()?,
        }
        defend_metrics::FalseAlarmRate::new(self.false_alarm_rate)?;
        if self.batch_size == 0 {
            return Err(Error::Config {
                field: "batch_size",
                value: "0".into(),
                expected: "at least 1".into(),
            });
        }
        Ok(())
    }
}

/// Settings as files have them, with the fields of earlier versions, which are told where they went.
#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Written {
    seed: u64,
    #[serde(alias = "fit")]
    resize_mode: ResizeMode,
    image_size: Option<usize>,
    reduced_decoding: bool,
    region: Option<Region>,
    tiles: Option<Tiles>,
    dense: Option<DenseConfig>,
    student: Student,
    false_alarm_rate: f64,
    #[serde(alias = "batch")]
    batch_size: usize,
    #[serde(alias = "arithmetic")]
    compute_precision: ComputePrecision,
    distill: Option<IgnoredAny>,
    aggregation: Option<IgnoredAny>,
}

impl Default for Written {
    fn default() -> Self {
        let DefendConfig {
            seed,
            resize_mode,
            image_size,
            reduced_decoding,
            region,
            tiles,
            dense,
            student,
            false_alarm_rate,
            batch_size,
            compute_precision,
        } = DefendConfig::default();
        Self {
            seed,
            resize_mode,
            image_size,
            reduced_decoding,
            region,
            tiles,
            dense,
            student,
            false_alarm_rate,
            batch_size,
            compute_precision,
            distill: None,
            aggregation: None,
        }
    }
}

impl TryFrom<Written> for DefendConfig {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        if written.distill.is_some() || written.aggregation.is_some() {
            return Err(
                "`distill` and `aggregation` are part of the masked student now: write \
                 \"student\": {\"masked\": {\"distill\": ..., \"aggregation\": ...}}, and \"dense\": {} where the teacher is tuned"
                    .into(),
            );
        }
        Ok(Self {
            seed: written.seed,
            resize_mode: written.resize_mode,
            image_size: written.image_size,
            reduced_decoding: written.reduced_decoding,
            region: written.region,
            tiles: written.tiles,
            dense: written.dense,
            student: written.student,
            false_alarm_rate: written.false_alarm_rate,
            batch_size: written.batch_size,
            compute_precision: written.compute_precision,
        })
    }
}

/// Settings in model files of format 1, which had the masked student alone.
#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ConfigOfFormat1 {
    seed: u64,
    #[serde(alias = "fit")]
    resize_mode: ResizeMode,
    image_size: Option<usize>,
    dense: Option<DenseConfig>,
    distill: DistillConfig,
    aggregation: Aggregation,
    #[serde(alias = "batch")]
    batch_size: usize,
    #[serde(alias = "arithmetic")]
    compute_precision: ComputePrecision,
}

impl Default for ConfigOfFormat1 {
    fn default() -> Self {
        let MaskedConfig {
            distill,
            aggregation,
        } = MaskedConfig::default();
        let config = DefendConfig::masked();
        Self {
            seed: config.seed,
            resize_mode: config.resize_mode,
            image_size: config.image_size,
            dense: config.dense,
            distill,
            aggregation,
            batch_size: config.batch_size,
            compute_precision: config.compute_precision,
        }
    }
}

impl From<ConfigOfFormat1> for DefendConfig {
    fn from(old: ConfigOfFormat1) -> Self {
        Self {
            seed: old.seed,
            resize_mode: old.resize_mode,
            image_size: old.image_size,
            dense: old.dense,
            student: Student::Masked(MaskedConfig {
                distill: old.distill,
                aggregation: old.aggregation,
            }),
            batch_size: old.batch_size,
            compute_precision: old.compute_precision,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_earlier_versions_are_told_what_to_write() {
        let read =
            |json: &str| serde_json::from_str::<DefendConfig>(json).map_err(|e| e.to_string());
        let error = read(r#"{"dense": null, "distill": {"epochs": 2}}"#).unwrap_err();
        assert!(
            error.contains("student") && error.contains("masked"),
            "{error}"
        );
        assert!(read(r#"{"epochs": 2}"#).unwrap_err().contains("epochs"));
        let masked = read(r#"{"student": {"masked": {"distill": {"epochs": 2}}}}"#).unwrap();
        assert_eq!(masked.masked_student().map(|m| m.distill.epochs), Some(2));
        for recipe in Recipe::ALL {
            let config = recipe.config();
            config.validate().unwrap();
            let json = serde_json::to_string(&config).unwrap();
            assert_eq!(read(&json).unwrap(), config);
        }
    }

    #[test]
    fn old_names_of_settings_are_read() {
        let old = r#"{"fit": {"center-crop": {"crop_pct": 0.9}}, "batch": 5, "arithmetic": "bf16",
            "student": {"masked": {"distill": {"batch": 7}}}, "dense": {"batch": 9}}"#;
        let new = r#"{"resize_mode": {"center-crop": {"crop_pct": 0.9}}, "batch_size": 5, "compute_precision": "bf16",
            "student": {"masked": {"distill": {"batch_size": 7}}}, "dense": {"batch_size": 9}}"#;
        let [old, new] = [old, new].map(|json| serde_json::from_str::<DefendConfig>(json).unwrap());
        assert_eq!(old, new);
        assert_eq!((old.batch_size, old.dense.unwrap().batch_size), (5, 9));
    }
}
