//! What a detector says of an image.

use defend_evidence::Weighed;
use serde::{Deserialize, Serialize};

use crate::PatchMap;

/// Answer to "is this image novel?".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The score is at or below the threshold.
    Normal,
    /// The score is above it.
    Novel,
}

/// What a detector says of an image.
#[derive(Debug, Clone, PartialEq)]
pub struct Novelty {
    /// Novelty score, larger for more novel.
    pub score: f64,
    /// The decision, where the detector has a threshold.
    pub verdict: Option<Verdict>,
    /// Share of normal images that score at least as high ([`Calibration::p_value`](crate::Calibration::p_value)), where the detector
    /// is calibrated.
    pub p_value: Option<f64>,
    /// Where the novelty is, for detectors that know, when it was asked for.
    pub map: Option<PatchMap>,
    /// What the score is made of, for the closed form.
    pub explanation: Option<Explanation>,
}

impl Novelty {
    /// A score alone.
    pub fn of_score(score: f64) -> Self {
        Self {
            score,
            verdict: None,
            p_value: None,
            map: None,
            explanation: None,
        }
    }
}

/// What a score of the closed form is made of: the sum of weight times z of the pieces.
///
/// z is in standard deviations above the mean of what the normal images get when they are left out.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explanation {
    /// Is the image explained by the normal ones?
    pub posterior: Weighed,
    /// Is it more like them than like images in general? `None` where that has no weight.
    pub contrast: Option<Weighed>,
    /// Is some small part unlike anything normal? `None` where that has no weight.
    pub patches: Option<Weighed>,
    /// Is it like a known abnormal image? 0 or more; `None` where none are known.
    pub known: Option<Weighed>,
    /// The normal images that explain it most, one of each group of near copies.
    pub nearest: Vec<NearestNormal>,
}

/// A normal image that explains another one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NearestNormal {
    /// Its name in the data set of the fit.
    pub name: String,
    /// Its group's share of `sum |k_i alpha_i|`, in `0..=1`; `v = 1 - sum k_i alpha_i` is the posterior variance.
    pub share: f64,
}
