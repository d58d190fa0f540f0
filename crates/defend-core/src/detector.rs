//! The detector: teacher and student stage.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use defend_data::{ContentHash, Preprocess};
use defend_distill::{Aggregation, Score};
use defend_evidence::{ClosedForm, Embeddings};
use defend_vit::{Backbone, Encoder};

use crate::calibration::Calibration;
use crate::closed_form::ClosedFormStudent;
use crate::masked::MaskedStudent;
use crate::normal_images::FittedOn;
use crate::novelty_detector::NoveltyDetector;
use crate::{DefendConfig, Error, MapScale, Novelty, Student};

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
    /// Hashes of the images that a masked student was trained on; the closed form keeps its own.
    pub(crate) trained_on: Vec<ContentHash>,
    /// Roles of custom parts that the fit used and that a score does not need any more.
    pub(crate) custom_roles: Vec<String>,
}

/// The role whose custom part [`Detector::with_score`] sets.
pub(crate) const SCORE: &str = "score";

impl Detector {
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

    /// Settings of the fit.
    pub fn config(&self) -> &DefendConfig {
        &self.config
    }

    /// Roles of the fit that custom parts had, for which the settings do not speak, such as `mask` or `student`.
    pub fn custom_roles(&self) -> &[String] {
        &self.custom_roles
    }

    /// Which images were fitted on, as far as that is known.
    pub(crate) fn fitted_on(&self) -> FittedOn {
        match &self.student {
            StudentStage::ClosedForm(closed) => {
                FittedOn::new(closed.normals.iter(), &closed.others)
            }
            StudentStage::Masked(_) => FittedOn::new(std::iter::empty(), &self.trained_on),
        }
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
        masked.custom.retain(|role| *role != SCORE);
        masked.custom.push(SCORE);
        self.custom_roles.retain(|role| role != SCORE);
        self.custom_roles.push(SCORE.to_owned());
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
        masked.custom.retain(|role| *role != SCORE);
        self.custom_roles.retain(|role| role != SCORE);
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
