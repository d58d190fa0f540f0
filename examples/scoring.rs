//! What the tables of `voc` and `ablate` measure: several scores of one fitted detector, and their AUROC.

use anyhow::{Result, bail};
use defend_core::distill::{Aggregation, Score, discrepancy};
use defend_core::metrics::auroc;
use defend_core::vit::ImageSource;
use defend_core::{Detector, ResizedImages};
use ndarray::ArrayView1;

/// The scores of all images with each aggregation, from one pass of teacher and student.
pub(crate) fn scores(
    detector: &Detector,
    images: &ResizedImages,
    aggregations: &[Aggregation],
) -> Result<Vec<Vec<f32>>> {
    let config = detector.config();
    let (Some((teacher, student)), Some(masked)) = (detector.networks(), config.masked_student())
    else {
        bail!(
            "these tables compare scores of a masked student: settings with \"student\": {{\"masked\": ...}}"
        );
    };
    let all: Vec<usize> = (0..images.len()).collect();
    let mut scores = vec![Vec::new(); aggregations.len()];
    for batch in all.chunks(config.batch_size) {
        let found = discrepancy(
            teacher,
            student,
            &masked.distill.distance,
            masked.distill.layers,
            &images.images(batch)?,
        )?;
        for (scores, aggregation) in scores.iter_mut().zip(aggregations) {
            scores.extend(aggregation.score(&found)?);
        }
    }
    Ok(scores)
}

/// AUROC, abnormal is positive.
pub(crate) fn area(scores: &[f32], abnormal: &[bool]) -> Result<f64> {
    let scores: Vec<f64> = scores.iter().map(|&s| f64::from(s)).collect();
    Ok(auroc(
        ArrayView1::from(&scores),
        ArrayView1::from(abnormal),
    )?)
}
