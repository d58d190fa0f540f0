//! `defend evaluate`

use std::sync::Arc;

use anyhow::{Result, bail};
use defend_core::data::{Dataset, ImageFolder};
use defend_core::metrics::{Interval, Threshold, auroc_interval, average_precision, fpr_at_tpr};
use defend_core::{Detector, Maps, Observer};
use ndarray::{Array1, ArrayView1};
use serde::Serialize;

use crate::arguments::{Common, Evaluate};
use crate::exit::Exit;
use crate::images::{find, scan_all};
use crate::progress::Progress;
use crate::say::tell;

/// Confidence of the intervals.
const CONFIDENCE: f64 = 0.95;

pub(crate) fn run(arguments: &Evaluate) -> Result<Exit> {
    let strict = arguments.common.strict;
    let folder = |name: &str| {
        let path = arguments.test.join(name);
        if !path.is_dir() {
            bail!(
                "{} is missing: the test folder needs the sub-folders normal and abnormal",
                path.display()
            );
        }
        Ok(find(&[path], strict, None)?.paths)
    };
    let (normal, abnormal) = (folder("normal")?, folder("abnormal")?);
    let detector = arguments.common.load(&arguments.model)?;
    let first_abnormal = normal.len();
    let paths = [normal, abnormal].concat();
    let images: Arc<dyn Dataset> = Arc::new(ImageFolder::from_paths(paths));
    let figures = evaluate(
        &detector,
        &images,
        first_abnormal,
        &arguments.common,
        &mut Progress::new(),
    )?;
    if arguments.json {
        tell!("{}", serde_json::to_string(&figures)?)?;
    } else {
        figures.print()?;
    }
    Ok(Exit::after_skipping(figures.unreadable))
}

/// What a detector is worth on a test set.
#[derive(Debug, Serialize)]
pub(crate) struct Figures {
    pub(crate) normal: usize,
    pub(crate) abnormal: usize,
    /// Images that could not be read.
    pub(crate) unreadable: usize,
    pub(crate) auroc: f64,
    /// Of the AUROC, by DeLong.
    pub(crate) confidence_95: [f64; 2],
    pub(crate) aupr: f64,
    pub(crate) fpr_at_95_tpr: f64,
    /// Share of the normal images called novel, where the model is calibrated.
    pub(crate) false_alarms: Option<f64>,
    /// Share of the abnormal images called novel, where the model is calibrated.
    pub(crate) detections: Option<f64>,
}

/// Scores images of which the first `first_abnormal` are normal and the others are not.
pub(crate) fn evaluate(
    detector: &Detector,
    images: &Arc<dyn Dataset>,
    first_abnormal: usize,
    common: &Common,
    observer: &mut dyn Observer,
) -> Result<Figures> {
    let (mut scores, mut abnormal) = (Vec::new(), Vec::new());
    let unreadable = scan_all(
        detector,
        images,
        Maps::Free,
        common.max_unreadable(),
        observer,
        &mut |outcome| {
            if let Ok((finding, _)) = outcome {
                scores.push(finding.novelty.score);
                abnormal.push(finding.index >= first_abnormal);
            }
            Ok(())
        },
    )?;
    let threshold = detector.calibration().map(|c| c.threshold);
    let figures = figures(&scores, &abnormal, threshold)?;
    Ok(Figures {
        unreadable,
        ..figures
    })
}

fn figures(scores: &[f64], abnormal: &[bool], threshold: Option<f64>) -> Result<Figures> {
    let labels = Array1::from_iter(abnormal.iter().copied());
    let views = (ArrayView1::from(scores), labels.view());
    let Interval {
        low,
        estimate,
        high,
    } = auroc_interval(views.0, views.1, CONFIDENCE)?;
    let count = |class: bool| abnormal.iter().filter(|&&a| a == class).count();
    let called_novel = |class: bool| -> Result<Option<f64>> {
        let Some(threshold) = threshold else {
            return Ok(None);
        };
        let threshold = Threshold::new(threshold)?;
        let of_class = scores.iter().zip(abnormal).filter(|(_, a)| **a == class);
        let novel = of_class.filter(|(s, _)| threshold.is_novel(**s)).count();
        Ok(Some(novel as f64 / count(class) as f64))
    };
    Ok(Figures {
        normal: count(false),
        abnormal: count(true),
        unreadable: 0,
        auroc: estimate,
        confidence_95: [low, high],
        aupr: average_precision(views.0, views.1)?,
        fpr_at_95_tpr: fpr_at_tpr(views.0, views.1, 0.95)?,
        false_alarms: called_novel(false)?,
        detections: called_novel(true)?,
    })
}

impl Figures {
    pub(crate) fn print(&self) -> std::io::Result<()> {
        let [low, high] = self.confidence_95;
        tell!(
            "images          {} normal, {} abnormal",
            self.normal,
            self.abnormal
        )?;
        tell!(
            "AUROC             {:.4}  (95 % confidence {low:.4} to {high:.4})",
            self.auroc
        )?;
        tell!("AUPR              {:.4}", self.aupr)?;
        tell!("FPR at 95 % TPR   {:.4}", self.fpr_at_95_tpr)?;
        if let (Some(false_alarms), Some(detections)) = (self.false_alarms, self.detections) {
            tell!(
                "at the threshold  {:.1} % of normal and {:.1} % of abnormal images called novel",
                100.0 * false_alarms,
                100.0 * detections
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_match_hand_computed_values() {
        let scores = [0.1, 0.2, 0.3, 0.4, 0.35, 0.5, 0.6, 0.7];
        let abnormal = [false, false, false, false, true, true, true, true];
        let found = figures(&scores, &abnormal, Some(0.32)).unwrap();
        // 15 of 16 pairs are ordered rightly; one normal image is above the threshold.
        assert_eq!(
            (found.normal, found.abnormal, found.auroc),
            (4, 4, 15.0 / 16.0)
        );
        assert_eq!(
            (found.false_alarms, found.detections),
            (Some(0.25), Some(1.0))
        );
        assert_eq!(found.fpr_at_95_tpr, 0.25);
        assert!(
            figures(&scores, &abnormal, None)
                .unwrap()
                .detections
                .is_none()
        );
        assert!(figures(&scores[..4], &abnormal[..4], None).is_err());
    }
}
