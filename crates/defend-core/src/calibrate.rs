//! How a detector gets its threshold, and what it decides.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Tensor;
use defend_data::{Dataset, RgbImage, content_hash};
use defend_evidence::Embeddings;
use defend_metrics::Error::{Empty, TooFewForConfidence, TooFewForRate};
use defend_metrics::{Promise, Threshold, threshold_for};
use ndarray::ArrayView1;

use crate::calibration::{Calibration, CalibrationSource};
use crate::detector::StudentStage;
use crate::scan::{ScoredBy, scan_each};
use crate::{Detector, Error, Maps, Novelty, Observer, Scan, Skipped, Verdict};

impl Detector {
    /// Chooses the threshold from held-out normal images such that at most the given share of normal images is called novel: on
    /// average over such samples for a [`FalseAlarmRate`](defend_metrics::FalseAlarmRate), or with confidence.
    ///
    /// Near copies among them count once. They must not be images that were fitted on: those are found by their hashes and refused. An earlier calibration stays when this one fails.
    ///
    /// # Errors
    /// [`Error::NoImages`] when nothing is readable; [`Error::FittedOn`]; [`Error::Metrics`] when there are too few images for
    /// the promise, naming the number that is needed.
    pub fn calibrate(
        &mut self,
        held_out: impl Dataset + 'static,
        promise: impl Into<Promise>,
        observer: &mut dyn Observer,
    ) -> Result<Scan, Error> {
        let tried = held_out.len();
        let held_out: Arc<dyn Dataset> = Arc::new(held_out);
        let fitted_on = self.fitted_on();
        let (scan, embeddings) = self.scan_watched(&held_out, observer, &|name, image| {
            // As the network sees it: the file may be another one.
            if fitted_on.contains(&content_hash(image)) {
                return Err(Error::FittedOn { name: name.into() });
            }
            Ok(())
        })?;
        if scan.findings.is_empty() {
            return Err(Error::no_images(tried, &scan.skipped));
        }
        // Models of earlier versions and fits on features have no hashes.
        if let (StudentStage::ClosedForm(closed), Some(embeddings)) = (&self.student, &embeddings)
            && let Some(image) = closed.evidence.first_known(embeddings)?
        {
            let found = scan.findings.get(image);
            return Err(Error::FittedOn {
                name: found.map_or_else(String::new, |f| f.name.clone()),
            });
        }
        let scores = self.one_a_group(&scan, embeddings.as_ref())?;
        let found = calibration(scores, promise.into(), CalibrationSource::HeldOut)?;
        self.calibration = Some(found);
        Ok(scan)
    }

    /// Scores images, and gives beside all findings the scores of those that are no near copies of an earlier one, as
    /// [`Detector::calibrate`] counts them: what new scores are compared with a calibration by. With a masked student that is all of
    /// them.
    ///
    /// # Errors
    /// As [`scan`](crate::scan()).
    pub fn scan_without_copies(
        &self,
        images: impl Dataset + 'static,
        observer: &mut dyn Observer,
    ) -> Result<(Scan, Vec<f64>), Error> {
        let images: Arc<dyn Dataset> = Arc::new(images);
        let (scan, embeddings) = self.scan_keeping_embeddings(&images, observer)?;
        let scores = self.one_a_group(&scan, embeddings.as_ref())?;
        Ok((scan, scores))
    }

    /// The score of the first image of each group of near copies: which one must not depend on what it shows, or the scores would not be
    /// a sample of normal ones.
    fn one_a_group(&self, scan: &Scan, embeddings: Option<&Embeddings>) -> Result<Vec<f64>, Error> {
        let scores = scan.scores();
        let (StudentStage::ClosedForm(closed), Some(embeddings)) = (&self.student, embeddings)
        else {
            return Ok(scores);
        };
        let groups = closed.evidence.near_copies(embeddings)?;
        let members = groups.members();
        let first = members.iter().filter_map(|group| group.iter().min());
        Ok(first.filter_map(|&i| scores.get(i).copied()).collect())
    }

    /// Scores images, without maps, and gives their embeddings too, for the closed form; memory grows with the images, about 5 KB each.
    pub(crate) fn scan_keeping_embeddings(
        &self,
        images: &Arc<dyn Dataset>,
        observer: &mut dyn Observer,
    ) -> Result<(Scan, Option<Embeddings>), Error> {
        self.scan_watched(images, observer, &|_, _| Ok(()))
    }

    /// As [`Detector::scan_keeping_embeddings`]; `watch` sees the name and the resized image of each finding.
    fn scan_watched(
        &self,
        images: &Arc<dyn Dataset>,
        observer: &mut dyn Observer,
        watch: &dyn Fn(&str, &RgbImage) -> Result<(), Error>,
    ) -> Result<(Scan, Option<Embeddings>), Error> {
        let kept: Mutex<Vec<Embeddings>> = Mutex::new(Vec::new());
        let keeping = ScoredBy {
            detector: self,
            score: |images: &Tensor| {
                let (mut novelties, embeddings) = self.checked_score(images, false)?;
                for novelty in &mut novelties {
                    novelty.map = None;
                }
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend(embeddings);
                Ok(novelties)
            },
        };
        let mut scan = Scan::default();
        scan_each::<Error>(&keeping, images, Maps::Free, observer, &mut |outcome| {
            match outcome {
                Ok((finding, image)) => {
                    watch(&finding.name, &image)?;
                    scan.findings.push(finding);
                }
                Err(failure) => scan.skipped.push(Skipped::from(failure)),
            }
            Ok(())
        })?;
        let kept = kept.into_inner().unwrap_or_else(PoisonError::into_inner);
        let embeddings = if kept.is_empty() {
            None
        } else {
            Some(Embeddings::joined(&kept)?)
        };
        Ok((scan, embeddings))
    }

    /// Chooses the threshold from the left-out scores of the normal images that were fitted on, near copies counted once.
    /// The share of normal images above it is about `rate`; [`Detector::calibrate`] is for a guarantee.
    ///
    /// An earlier calibration stays when this one fails.
    ///
    /// # Errors
    /// [`Error::Config`] for a masked student, which has no such scores; [`Error::Metrics`] when there are too few
    /// images for the rate, naming the number that is needed.
    pub fn calibrate_on_left_out(
        &mut self,
        promise: impl Into<Promise>,
    ) -> Result<&Calibration, Error> {
        let Some(evidence) = self.evidence() else {
            return Err(Error::Config {
                field: "student",
                value: "masked".into(),
                expected: "closed-form, whose normal images can be left out without a refit; calibrate a masked student \
                           on held-out images"
                    .into(),
            });
        };
        let scores = evidence.left_out().to_vec();
        let found = calibration(scores, promise.into(), CalibrationSource::LeftOut)?;
        Ok(self.calibration.insert(found))
    }

    /// As [`Detector::calibrate_on_left_out`]; whether there were enough images for the rate. If not, the calibration stays.
    pub(crate) fn calibrate_if_enough(
        &mut self,
        promise: impl Into<Promise>,
    ) -> Result<bool, Error> {
        match self.calibrate_on_left_out(promise) {
            Ok(_) => Ok(true),
            Err(Error::Metrics(
                TooFewForRate { .. } | TooFewForConfidence { .. } | Empty { .. },
            )) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The threshold, where there is one.
    pub fn calibration(&self) -> Option<&Calibration> {
        self.calibration.as_ref()
    }

    /// Adds the verdicts, where there is a threshold.
    pub(crate) fn decide(&self, novelties: &mut [Novelty]) -> Result<(), Error> {
        if let Some(calibration) = &self.calibration {
            let threshold = Threshold::new(calibration.threshold)?;
            for novelty in novelties {
                novelty.p_value = calibration.p_value(novelty.score);
                novelty.verdict = Some(if threshold.is_novel(novelty.score) {
                    Verdict::Novel
                } else {
                    Verdict::Normal
                });
            }
        }
        Ok(())
    }
}

/// The threshold that keeps a promise, from scores of normal images.
fn calibration(
    mut scores: Vec<f64>,
    promise: Promise,
    source: CalibrationSource,
) -> Result<Calibration, Error> {
    let threshold = threshold_for(ArrayView1::from(&scores), promise)?;
    scores.sort_by(f64::total_cmp);
    Ok(Calibration {
        threshold: threshold.get(),
        false_alarm_rate: promise.rate().get(),
        confidence: match promise {
            Promise::OnAverage(_) => None,
            Promise::WithConfidence { confidence, .. } => Some(confidence),
        },
        images: scores.len(),
        scores,
        source,
    })
}
