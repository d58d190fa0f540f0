//! Scoring a folder as a whole.

use std::sync::Arc;

use defend_data::Dataset;
use defend_evidence::Share;
use defend_metrics::threshold_for;
use ndarray::ArrayView1;
use serde::{Deserialize, Serialize};

use crate::{Detector, Error, Finding, Observer, Scan, Skipped, Verdict};

/// Where an image belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// Normal alone and together with the others.
    Normal,
    /// Novel alone and together with the others.
    Novel,
    /// One of the two says so: worth a look.
    Unsure,
}

/// What was found in an image of a folder.
#[derive(Debug, Clone)]
pub struct SortedFinding {
    /// What the image alone says.
    pub alone: Finding,
    /// Score together with the others, larger for more novel.
    pub score: f64,
    /// Share of the normal images' left-out scores that are at least as large as the score alone, in `0..=1`: of normal
    /// images, no more than about a share p has a p-value below p.
    pub p_value: f64,
    /// `None` without a threshold.
    pub place: Option<Place>,
}

/// A folder scored as a whole.
#[derive(Debug, Clone)]
pub struct Sorted {
    /// One finding a readable image, in the data set's order.
    pub findings: Vec<SortedFinding>,
    /// Images that could not be read.
    pub skipped: Vec<Skipped>,
    /// Estimated share of abnormal images.
    pub abnormal: Share,
    /// Weight of what the images say of each other, `0..=1`; 0 where few seem abnormal: the scores are then those of the
    /// images alone.
    pub weight: f64,
}

/// Scores all images of a data set, then again by what they have in common: many abnormal images tell what abnormal ones look
/// like. `expected`: the share of abnormal images, in `0..1`, where the caller knows it and wants the images compared in any case.
///
/// Memory grows with the images, about 5 KB each.
///
/// # Errors
/// [`Error::Config`] for a masked student or an expected share out of range; as [`scan`](crate::scan()).
pub fn sort(
    detector: &Detector,
    images: impl Dataset + 'static,
    expected: Option<f64>,
    observer: &mut dyn Observer,
) -> Result<Sorted, Error> {
    let closed = detector.closed_form()?;
    let images: Arc<dyn Dataset> = Arc::new(images);
    let (scan, embeddings) = detector.scan_keeping_embeddings(&images, observer)?;
    let Scan { findings, skipped } = scan;
    let Some(embeddings) = embeddings.filter(|_| !findings.is_empty()) else {
        return Err(Error::no_images(images.len(), &skipped));
    };
    let scores: Vec<f64> = findings.iter().map(|f| f.novelty.score).collect();
    let together = closed.evidence.together(&embeddings, &scores, expected)?;
    let threshold = detector.calibration().and_then(|calibration| {
        let promise = calibration.promise().ok()?;
        threshold_for(ArrayView1::from(&together.left_out), promise).ok()
    });
    let place = |alone: Verdict, score: f64| {
        // Where nothing was compared there is nothing to differ in.
        let together = match threshold {
            Some(threshold) if together.weight > 0.0 => threshold.is_novel(score),
            _ => alone == Verdict::Novel,
        };
        match (alone, together) {
            (Verdict::Normal, false) => Place::Normal,
            (Verdict::Novel, true) => Place::Novel,
            _ => Place::Unsure,
        }
    };
    let values = together.scores.iter().zip(&together.p_values);
    let sorted = findings.into_iter().zip(values);
    Ok(Sorted {
        findings: sorted
            .map(|(alone, (&score, &p_value))| SortedFinding {
                place: alone.novelty.verdict.map(|verdict| place(verdict, score)),
                alone,
                score,
                p_value,
            })
            .collect(),
        skipped,
        abnormal: together.abnormal,
        weight: together.weight,
    })
}
