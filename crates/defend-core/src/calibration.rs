//! The threshold of a detector: where it comes from, and the verdicts that it gives.

use defend_metrics::{Error, FalseAlarmRate, Promise, false_alarm_range, p_value};
use serde::{Deserialize, Serialize};

/// The threshold of a detector and where it comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// Images with a larger score are novel.
    pub threshold: f64,
    /// The share of normal images that may be called novel.
    pub false_alarm_rate: f64,
    /// Confidence with which this threshold keeps the share; `None`: it is kept on average over calibrations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confidence: Option<f64>,
    /// Normal images that the threshold was taken from; near copies count once.
    pub images: usize,
    /// Their scores, ascending; empty in models of earlier versions.
    #[serde(default)]
    pub scores: Vec<f64>,
    /// Where their scores come from.
    #[serde(default)]
    pub source: CalibrationSource,
}

impl Calibration {
    /// What the threshold was chosen for.
    ///
    /// # Errors
    /// [`Error::Config`] for a model file with a rate out of range.
    pub fn promise(&self) -> Result<Promise, Error> {
        let rate = FalseAlarmRate::new(self.false_alarm_rate)?;
        Ok(match self.confidence {
            None => Promise::OnAverage(rate),
            Some(confidence) => Promise::WithConfidence { rate, confidence },
        })
    }

    /// Share of normal images that score at least as high, the image itself counted. Where the scores are of held-out images, no more than
    /// a share `p` of new normal images has a p-value of `p` or less; where they are left-out scores of the fit, about that share. `None` for a model of an earlier version, which has no scores to compare with.
    pub fn p_value(&self, score: f64) -> Option<f64> {
        (!self.scores.is_empty()).then(|| p_value(&self.scores, score))
    }

    /// Range that the share of normal images called novel lies in with `confidence`, for as many images as there were.
    ///
    /// # Errors
    /// [`Error::Config`] for a confidence outside `0 < confidence < 1`, and for a model of an earlier version.
    pub fn false_alarm_range(&self, confidence: f64) -> Result<[f64; 2], Error> {
        let above = self.scores.iter().filter(|s| **s > self.threshold).count();
        false_alarm_range(self.scores.len(), above, confidence)
    }
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
