//! What can go wrong in a training run.

use std::path::PathBuf;

/// Errors of `defend-train`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting lies outside its range.
    #[error("{field} is {value}, expected {expected}")]
    Config {
        /// Name of the field.
        field: &'static str,
        /// Value that was given.
        value: f64,
        /// What the field accepts.
        expected: &'static str,
    },
    /// There is nothing to train on.
    #[error("no images to train on, expected at least one")]
    NoImages,
    /// The run was stopped by whoever watches it.
    #[error("stopped after step {step}")]
    Stopped {
        /// Steps taken.
        step: usize,
    },
    /// Training ran away; no parameter was changed by this step, and with checkpoints the run was saved as it was before.
    #[error(
        "the loss is {loss} at step {step}, on the images {images:?}: lower the learning rate, set gradient_clip or check these images"
    )]
    Diverged {
        /// Steps taken before.
        step: usize,
        /// The loss.
        loss: f64,
        /// The batch, by positions among the images.
        images: Vec<usize>,
    },
    /// A gradient is NaN or infinite; no parameter was changed by this step, and with checkpoints the run was saved as it was before.
    #[error(
        "the gradient of \"{parameter}\" is not finite at step {step}, on the images {images:?}: lower the learning rate or check these images"
    )]
    NonFiniteGradient {
        /// Name of the parameter.
        parameter: String,
        /// Number of steps taken before.
        step: usize,
        /// The batch, by positions among the images.
        images: Vec<usize>,
    },
    /// A checkpoint could not be read or written.
    #[error("{action} the checkpoint {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was done with it.
        action: &'static str,
        /// What the file system says.
        source: std::io::Error,
    },
    /// A file is no checkpoint of this run.
    #[error("{path} is no checkpoint to go on from: {reason}")]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// The images of the batch that a run has failed on, by their positions.
    pub fn batch(&self) -> Option<&[usize]> {
        match self {
            Self::Diverged { images, .. } | Self::NonFiniteGradient { images, .. } => Some(images),
            _ => None,
        }
    }
}
