//! How a detector gets its threshold, and what it decides.

use defend_data::Dataset;
use defend_metrics::Error::{Empty, TooFewForRate};
use defend_metrics::{FalseAlarmRate, Threshold, threshold_for};
use ndarray::ArrayView1;

use crate::calibration::{Calibration, CalibrationSource};
use crate::{Detector, Error, Novelty, Observer, Scan, Verdict, scan};

impl Detector {
    /// Chooses the threshold from held-out normal images such that at most the given share of normal
    /// images is called novel, on average over such samples.
    ///
    /// An earlier calibration stays when this one fails.
    ///
    /// # Errors
    /// [`Error::NoImages`] when nothing is readable; [`Error::Metrics`] when there are too few images for
    /// the rate, naming the number that is needed.
    pub fn calibrate(
        &mut self,
        held_out: impl Dataset + 'static,
        rate: FalseAlarmRate,
        observer: &mut dyn Observer,
    ) -> Result<Scan, Error> {
        let tried = held_out.len();
        let scan = scan(self, held_out, observer)?;
        let scores = scan.scores();
        if scores.is_empty() {
            return Err(Error::no_images(tried, &scan.skipped));
        }
        let threshold = threshold_for(ArrayView1::from(&scores), rate)?;
        self.calibration = Some(Calibration {
            threshold: threshold.get(),
            false_alarm_rate: rate.get(),
            images: scores.len(),
            source: CalibrationSource::HeldOut,
        });
        Ok(scan)
    }

    /// Chooses the threshold from the left-out scores of the normal images that were fitted on, near copies counted once.
    /// The share of normal images above it is about `rate`; [`Detector::calibrate`] is for a guarantee.
    ///
    /// An earlier calibration stays when this one fails.
    ///
    /// # Errors
    /// [`Error::Config`] for a masked student, which has no such scores; [`Error::Metrics`] when there are too few
    /// images for the rate, naming the number that is needed.
    pub fn calibrate_on_left_out(&mut self, rate: FalseAlarmRate) -> Result<&Calibration, Error> {
        let Some(evidence) = self.evidence() else {
            return Err(Error::Config {
                field: "student",
                value: "masked".into(),
                expected: "closed-form, whose normal images can be left out without a refit; calibrate a masked student \
                           on held-out images"
                    .into(),
            });
        };
        let scores = evidence.left_out();
        let threshold = threshold_for(ArrayView1::from(scores), rate)?;
        let calibration = Calibration {
            threshold: threshold.get(),
            false_alarm_rate: rate.get(),
            images: scores.len(),
            source: CalibrationSource::LeftOut,
        };
        Ok(self.calibration.insert(calibration))
    }

    /// As [`Detector::calibrate_on_left_out`]; whether there were enough images for the rate. If not, the calibration stays.
    pub(crate) fn calibrate_if_enough(&mut self, rate: FalseAlarmRate) -> Result<bool, Error> {
        match self.calibrate_on_left_out(rate) {
            Ok(_) => Ok(true),
            Err(Error::Metrics(TooFewForRate { .. } | Empty { .. })) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The threshold, where there is one.
    pub fn calibration(&self) -> Option<&Calibration> {
        self.calibration.as_ref()
    }

    /// Adds the verdicts, where there is a threshold.
    pub(crate) fn decide(&self, novelties: &mut [Novelty]) -> Result<(), Error> {
        if let Some(calibration) = self.calibration {
            let threshold = Threshold::new(calibration.threshold)?;
            for novelty in novelties {
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
