//! How a fit went.

use defend_evidence::Summary;
use defend_train::TrainingReport;

use crate::Detector;
use crate::scan::Skipped;

/// A fitted detector and how the fit went.
pub struct Fitted {
    /// The detector. In closed form it has a threshold already, where there are enough images for one.
    pub detector: Detector,
    /// The dense stage, where it ran.
    pub dense: Option<TrainingReport>,
    /// The student stage.
    pub student: StudentReport,
    /// Images that were used.
    pub images: usize,
    /// Images that could not be read.
    pub skipped: Vec<Skipped>,
}

/// How the student stage went.
#[derive(Debug, Clone, PartialEq)]
pub enum StudentReport {
    /// In closed form.
    ClosedForm(ClosedFormReport),
    /// By masked distillation.
    Masked(TrainingReport),
}

/// What the closed form found in the normal images.
#[derive(Debug, Clone, PartialEq)]
pub struct ClosedFormReport {
    /// Images, groups of near copies, and what the weights come from.
    pub summary: Summary,
    /// Weight of the contrast with ordinary photos, 0 where it is off.
    pub contrast_weight: f64,
    /// Weight of the patches, 0 where normal images are too various for them.
    pub patch_weight: f64,
    /// Where the ordinary photos are from; `None` without any: the contrast is off, and a background would switch it on.
    pub background: Option<String>,
    /// Images that were left out as suspects.
    pub dropped: Vec<String>,
}

impl Fitted {
    /// The distillation of a masked student.
    pub fn distill(&self) -> Option<&TrainingReport> {
        match &self.student {
            StudentReport::Masked(report) => Some(report),
            StudentReport::ClosedForm(_) => None,
        }
    }

    /// What the closed form found.
    pub fn closed_form(&self) -> Option<&ClosedFormReport> {
        match &self.student {
            StudentReport::ClosedForm(report) => Some(report),
            StudentReport::Masked(_) => None,
        }
    }
}
