//! What training stages share: one loop over shuffled batches, AdamW, learning-rate schedules, moving averages of parameters, a cache of
//! what frozen networks compute, and checkpoints from which a stopped run goes on to the same bits.
//!
//! A stage says what the loss of a batch is ([`TrainingStage`]); [`train`] does the rest.

mod adamw;
mod cache;
mod checkpoint;
mod error;
mod moving_average;
mod schedule;
mod training;

pub use adamw::{AdamW, AdamWConfig, ParameterGroup};
pub use cache::{TensorCache, rows_of};
pub use checkpoint::Checkpoints;
pub use error::Error;
pub use moving_average::MovingAverage;
pub use schedule::{Schedule, half_cosine};
pub use training::{
    OnStep, Training, TrainingPlan, TrainingReport, TrainingStage, TrainingStep, shuffled_batches,
    train,
};

/// The README's example runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
