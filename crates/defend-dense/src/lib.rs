//! DEFEND: dense fine-tuning of a backbone on normal images (paper, section 3.1, eq. 1).
//!
//! The last blocks of a pretrained Vision Transformer learn to give patches of the same object the same
//! prototype, whether they are seen in the full view or in a crop. [`DenseTuner`] runs the stage on any
//! [`defend_vit::Trainable`] backbone; the loss is a role, [`DenseObjective`], and the paper's is
//! [`PrototypeObjective`].

mod config;
mod crop;
mod error;
mod head;
mod objective;
mod target;
mod tuner;

pub use config::{Assignment, DenseConfig, Resampling, View};
pub use crop::{CropBox, CropSampler, extract};
pub use error::Error;
pub use head::ProjectionHead;
pub use objective::{DenseObjective, PrototypeObjective};
pub use target::crop_targets;
pub use tuner::DenseTuner;
