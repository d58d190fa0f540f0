//! The threshold of a detector: where it comes from, and the verdicts that it gives.

use serde::{Deserialize, Serialize};

/// The threshold of a detector and where it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// Images with a larger score are novel.
    pub threshold: f64,
    /// The share of normal images that may be called novel.
    pub false_alarm_rate: f64,
    /// Normal images that the threshold was taken from; near copies that were fitted on count once.
    pub images: usize,
    /// Where their scores come from.
    #[serde(default)]
    pub source: CalibrationSource,
}

/// Where the scores behind a threshold come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CalibrationSource {
    /// Held-out normal images. On average over such images the rate is kept.
    #[default]
    HeldOut,
    /// The normal images of the fit, each scored as if it had been left out. About the rate, without a guarantee.
    LeftOut,
}
