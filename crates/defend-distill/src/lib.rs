//! Masked knowledge distillation (paper, sections 3.2 and 3.3).
//!
//! A student that has never seen anything but normal images learns to predict the teacher's features
//! from part of each image. Where it fails at test time, the image is novel. [`Distiller`] trains any
//! [`defend_vit::Trainable`] student against any [`defend_vit::Backbone`] teacher; the mask
//! ([`MaskPolicy`]), the distance ([`DistillObjective`]) and the step from patch distances to a score
//! ([`Aggregation`]) are roles with the paper's choices behind them.

mod config;
mod distiller;
mod error;
mod layers;
mod mask;
mod objective;
mod score;

pub use config::DistillConfig;
pub use distiller::{DistillRoles, Distiller};
pub use error::Error;
pub use mask::{Mask, MaskPolicy, Selection};
pub use objective::{DistillObjective, FeatureDistance, FeatureNorm, NormalizedSide, Penalty};
pub use score::{Aggregation, Discrepancy, Score, discrepancy};
