//! What can go wrong in a detector.

use std::path::PathBuf;

use crate::Skipped;

/// Errors of `defend-core`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting has no meaning.
    #[error("{field} is {value}, expected {expected}")]
    Config {
        /// Name of the field.
        field: &'static str,
        /// Value that was given.
        value: String,
        /// What the field accepts.
        expected: String,
    },
    /// No image could be read, so there is nothing to learn or to calibrate with.
    #[error("none of the {tried} images could be read; the first: {first}")]
    NoImages {
        /// How many were tried.
        tried: usize,
        /// Name and fault of the first.
        first: String,
    },
    /// An image could not be read and the run is strict.
    #[error("{name} cannot be read")]
    Unreadable {
        /// Name of the image.
        name: String,
        /// Why.
        #[source]
        source: defend_data::Error,
    },
    /// A model file could not be read or written.
    #[error("{}: {action} failed", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is not a model of this library.
    #[error("{}: {reason}", path.display())]
    Model {
        /// The file.
        path: PathBuf,
        /// What is wrong and what is expected.
        reason: String,
    },
    /// A detector with custom parts cannot be saved as a file that loads by itself.
    #[error("this detector cannot be saved: its {role} is not one of the library's")]
    NotSavable {
        /// The custom part.
        role: &'static str,
    },
    /// A file is no background of this library, or damaged.
    #[error("{origin}: {reason}")]
    Background {
        /// The file.
        origin: String,
        /// What is wrong and what is expected.
        reason: String,
    },
    /// A background was made by another teacher than the one that is fitted with.
    #[error(
        "the background was made by {background}, expected the teacher {teacher}: make one with `defend background`"
    )]
    OtherTeacher {
        /// The teacher that made it.
        background: String,
        /// The teacher of the fit.
        teacher: String,
    },
    /// A file is no table of features of this library, or damaged.
    #[error("{}: {reason}", path.display())]
    Features {
        /// The file.
        path: PathBuf,
        /// What is wrong and what is expected.
        reason: String,
    },
    /// Features were made by another teacher than the one that is fitted with.
    #[error(
        "the features were made by {features}, expected the teacher {teacher}: make them with `defend embed`"
    )]
    OtherFeatures {
        /// The teacher that made them.
        features: String,
        /// The teacher of the fit.
        teacher: String,
    },
    /// Loss or gradient of a batch are not finite; with checkpoints the run was saved as it was before it.
    #[error("training ran away on a batch of {}", images.join(", "))]
    TrainingBatch {
        /// Names of the batch's images.
        images: Vec<String>,
        /// What was not finite, and in which step.
        source: Box<Error>,
    },
    /// The run was stopped by its [`Observer`](crate::Observer).
    #[error("stopped")]
    Stopped,
    /// An image was given to calibrate on that the detector was fitted on.
    #[error(
        "{name} is one of the normal images that were fitted on: their scores say nothing of new images; calibrate on others"
    )]
    FittedOn {
        /// Name of the image.
        name: String,
    },
    /// An image was given as abnormal that the detector was fitted on as normal.
    #[error("{name} is one of the normal images that were fitted on, expected an abnormal one")]
    AlsoNormal {
        /// Name of the image.
        name: String,
    },
    /// An image was given as normal that the detector knows as abnormal.
    #[error("{name} is one of the known abnormal images, expected a normal one")]
    AlsoAbnormal {
        /// Name of the image.
        name: String,
    },
    /// Images that are not among the normal ones were to be forgotten.
    #[error(
        "{count} images to forget are not among the normal ones that were fitted on, the first: {first}; names are those of the fit, \
         and an image that was there twice has one of its names"
    )]
    UnknownImages {
        /// How many.
        count: usize,
        /// Name of the first.
        first: String,
    },
    /// Models that are scored together have different teachers, or look at different parts of an image.
    #[error(
        "{model} looks at images in another way than the first model: its teacher is {found}, the first one's {expected}, and size, \
         region and tiles have to be the same too"
    )]
    OtherProfile {
        /// The model.
        model: String,
        /// Its teacher.
        found: String,
        /// The first model's.
        expected: String,
    },
    /// The teacher's features of an image are not finite.
    #[error(
        "the teacher's features of {name} are not finite: its weights or the image are damaged"
    )]
    NonFiniteFeatures {
        /// Name of the image.
        name: String,
    },
    /// The detector's scores are not finite.
    #[error("the score of {name} is {score}: the model or the image is damaged")]
    NonFiniteScore {
        /// Name of the image.
        name: String,
        /// The score.
        score: f64,
    },
    /// A batch of images is not what the detector was fitted on.
    #[error("the images have shape {found:?}, expected [images, 3, {height}, {width}]")]
    Images {
        /// Shape of the batch.
        found: Vec<usize>,
        /// Width that the detector was fitted on, pixels.
        width: u32,
        /// Height that the detector was fitted on, pixels.
        height: u32,
    },
    /// Reading images failed.
    #[error(transparent)]
    Data(#[from] defend_data::Error),
    /// A backbone or its weights failed.
    #[error(transparent)]
    Vit(#[from] defend_vit::Error),
    /// The dense stage failed.
    #[error(transparent)]
    Dense(#[from] defend_dense::Error),
    /// The distillation stage failed.
    #[error(transparent)]
    Distill(#[from] defend_distill::Error),
    /// A training run failed.
    #[error(transparent)]
    Train(#[from] defend_train::Error),
    /// The closed form failed.
    #[error(transparent)]
    Evidence(#[from] defend_evidence::Error),
    /// A metric or a threshold failed.
    #[error(transparent)]
    Metrics(#[from] defend_metrics::Error),
    /// candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// Whether a training run says that it was stopped.
    pub(crate) fn is_stop(&self) -> bool {
        use defend_train::Error::Stopped;
        matches!(
            self,
            Self::Train(Stopped { .. })
                | Self::Dense(defend_dense::Error::Train(Stopped { .. }))
                | Self::Distill(defend_distill::Error::Train(Stopped { .. }))
        )
    }

    /// A training run's failure on a batch with the names of its images.
    pub(crate) fn naming_batch(self, name: impl Fn(usize) -> String) -> Self {
        let batch = match &self {
            Self::Train(error)
            | Self::Dense(defend_dense::Error::Train(error))
            | Self::Distill(defend_distill::Error::Train(error)) => error.batch(),
            _ => None,
        };
        match batch.map(|batch| batch.iter().map(|&image| name(image)).collect()) {
            Some(images) => Self::TrainingBatch {
                images,
                source: Box::new(self),
            },
            None => self,
        }
    }

    /// Features that are not finite under the name of their image; `name`: of an image of the batch.
    pub(crate) fn naming(self, name: impl FnOnce(usize) -> String) -> Self {
        match self {
            Self::Evidence(defend_evidence::Error::NotFinite { image, .. }) => {
                Self::NonFiniteFeatures { name: name(image) }
            }
            other => other,
        }
    }

    /// None of the images that were tried could be read.
    pub(crate) fn no_images(tried: usize, skipped: &[Skipped]) -> Self {
        Self::NoImages {
            tried,
            first: skipped
                .first()
                .map_or_else(|| "there are none".into(), Skipped::to_string),
        }
    }
}
