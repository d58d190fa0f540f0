//! The detector: teacher, student stage and threshold.

use candle_core::{Device, Tensor};
use defend_data::{Dataset, Preprocess};
use defend_distill::{Aggregation, Score};
use defend_evidence::{ClosedForm, Embeddings};
use defend_metrics::Error::{Empty, TooFewForRate};
use defend_metrics::{FalseAlarmRate, Threshold, threshold_for};
use defend_vit::{Backbone, Encoder};
use ndarray::ArrayView1;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

use crate::closed_form::ClosedFormStudent;
use crate::masked::MaskedStudent;
use crate::{DefendConfig, Error, MapScale, Novelty, Observer, Scan, Student, Verdict, scan};

/// Role: anything that scores images, larger for more novel.
pub trait NoveltyDetector: Send + Sync {
    /// How images are prepared for [`NoveltyDetector::score`].
    fn preprocess(&self) -> &Preprocess;

    /// Where the images have to be.
    fn device(&self) -> &Device;

    /// Images a forward pass.
    fn batch_size(&self) -> usize {
        32
    }

    /// One result an image; `images`: `[B, 3, H, W]`, prepared as [`NoveltyDetector::preprocess`] says. Maps are among the
    /// results where they cost nothing.
    ///
    /// # Errors
    /// When the images do not fit.
    fn score(&self, images: &Tensor) -> Result<Vec<Novelty>, Error>;

    /// As [`NoveltyDetector::score`], with maps where the detector has them at all.
    ///
    /// # Errors
    /// When the images do not fit.
    fn score_with_maps(&self, images: &Tensor) -> Result<Vec<Novelty>, Error> {
        self.score(images)
    }
}

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

pub(crate) enum StudentStage {
    ClosedForm(Box<ClosedFormStudent>),
    Masked(MaskedStudent),
}

/// A frozen teacher, densely tuned or not, and a student stage that has learnt the normal images from its features.
pub struct Detector {
    pub(crate) student: StudentStage,
    pub(crate) config: DefendConfig,
    pub(crate) preprocess: Preprocess,
    pub(crate) device: Device,
    pub(crate) calibration: Option<Calibration>,
    pub(crate) map_scale: MapScale,
}

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

    /// The student in closed form.
    ///
    /// # Errors
    /// [`Error::Config`] for a masked one.
    pub(crate) fn closed_form(&self) -> Result<&ClosedFormStudent, Error> {
        match &self.student {
            StudentStage::ClosedForm(closed) => Ok(closed),
            StudentStage::Masked(_) => Err(needs_closed_form()),
        }
    }

    /// As [`Detector::closed_form`], to be changed.
    pub(crate) fn closed_form_mut(&mut self) -> Result<&mut ClosedFormStudent, Error> {
        match &mut self.student {
            StudentStage::ClosedForm(closed) => Ok(closed),
            StudentStage::Masked(_) => Err(needs_closed_form()),
        }
    }

    /// The threshold, where there is one.
    pub fn calibration(&self) -> Option<&Calibration> {
        self.calibration.as_ref()
    }

    /// Settings of the fit.
    pub fn config(&self) -> &DefendConfig {
        &self.config
    }

    /// How patch values become the colours of a heat map.
    pub fn map_scale(&self) -> &MapScale {
        &self.map_scale
    }

    /// The network whose features are learnt.
    pub fn teacher(&self) -> &dyn Encoder {
        match &self.student {
            StudentStage::ClosedForm(closed) => &*closed.teacher,
            StudentStage::Masked(masked) => &*masked.teacher,
        }
    }

    /// What the closed form knows, where the student is in closed form.
    pub fn evidence(&self) -> Option<&ClosedForm> {
        match &self.student {
            StudentStage::ClosedForm(closed) => Some(&closed.evidence),
            StudentStage::Masked(_) => None,
        }
    }

    /// Teacher and trained student, where the student is a network.
    pub fn networks(&self) -> Option<(&dyn Backbone, &dyn Backbone)> {
        match &self.student {
            StudentStage::ClosedForm(_) => None,
            StudentStage::Masked(masked) => Some((&*masked.teacher, &*masked.student)),
        }
    }

    /// Replaces a masked student's step from patch distances to a score; calibrate again afterwards.
    ///
    /// # Errors
    /// [`Error::Config`] for the closed form, which has no such step.
    pub fn with_score(mut self, score: Arc<dyn Score>) -> Result<Self, Error> {
        let StudentStage::Masked(masked) = &mut self.student else {
            return Err(not_masked("score"));
        };
        masked.score = score;
        masked.custom = Some("score");
        self.calibration = None;
        Ok(self)
    }

    /// Replaces a masked student's score by one of the library's; calibrate again afterwards.
    ///
    /// # Errors
    /// [`Error::Config`] for a score of the CLS token of a student that has not learnt it, and for the closed form.
    pub fn with_aggregation(mut self, aggregation: Aggregation) -> Result<Self, Error> {
        let (StudentStage::Masked(masked), Student::Masked(settings)) =
            (&mut self.student, &self.config.student)
        else {
            return Err(not_masked("aggregation"));
        };
        let mut settings = settings.clone();
        settings.aggregation = aggregation;
        let config = DefendConfig {
            student: Student::Masked(settings),
            ..self.config.clone()
        };
        config.validate()?;
        masked.score = Arc::new(aggregation);
        self.config = config;
        self.calibration = None;
        Ok(self)
    }

    /// Scores with verdicts, and the embeddings behind them in the closed form.
    pub(crate) fn checked_score(
        &self,
        images: &Tensor,
        with_maps: bool,
    ) -> Result<(Vec<Novelty>, Option<Embeddings>), Error> {
        self.check(images)?;
        let (mut novelties, embeddings) = match (&self.student, &self.config.student) {
            (StudentStage::ClosedForm(closed), _) => {
                let (novelties, embeddings) = closed.score(images, with_maps)?;
                (novelties, Some(embeddings))
            }
            (StudentStage::Masked(masked), Student::Masked(config)) => {
                (masked.score(images, config)?, None)
            }
            (StudentStage::Masked(_), Student::ClosedForm(_)) => return Err(not_masked("student")),
        };
        self.decide(&mut novelties)?;
        Ok((novelties, embeddings))
    }

    /// Refuses images of another size.
    pub(crate) fn check(&self, images: &Tensor) -> Result<(), Error> {
        let (width, height) = self.preprocess.input_size();
        // The backbones take any size, but their distances at another one say nothing.
        if !matches!(images.dims(), &[_, 3, h, w] if h == height as usize && w == width as usize) {
            return Err(Error::Images {
                found: images.dims().to_vec(),
                width,
                height,
            });
        }
        Ok(())
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

fn needs_closed_form() -> Error {
    Error::Config {
        field: "student",
        value: "masked".into(),
        expected: "closed-form: a masked student can neither learn on, name suspects nor sort"
            .into(),
    }
}

fn not_masked(field: &'static str) -> Error {
    Error::Config {
        field,
        value: "set".into(),
        expected: "a masked student: the closed form has its own score".into(),
    }
}

impl NoveltyDetector for Detector {
    fn preprocess(&self) -> &Preprocess {
        &self.preprocess
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn batch_size(&self) -> usize {
        match &self.student {
            StudentStage::ClosedForm(closed) => closed.blocks.images_of(self.config.batch_size),
            StudentStage::Masked(_) => self.config.batch_size,
        }
    }

    fn score(&self, images: &Tensor) -> Result<Vec<Novelty>, Error> {
        Ok(self.checked_score(images, false)?.0)
    }

    fn score_with_maps(&self, images: &Tensor) -> Result<Vec<Novelty>, Error> {
        Ok(self.checked_score(images, true)?.0)
    }
}
