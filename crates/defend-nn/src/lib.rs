//! What every trainable stage of `defend` shares: differentiable fused operations, AdamW with
//! parameter groups, learning-rate schedules and seeded random numbers.
//!
//! candle's own fused `softmax_last_dim` and `layer_norm` have no backward pass and drop gradients
//! without an error; the operations in [`ops`] have one, proven against PyTorch and finite
//! differences, and run at the speed of the processor's matrix units on `f32` CPU tensors. On CUDA most have kernels too; on any
//! other device or type the same functions compose candle's differentiable primitives.

mod adamw;
mod backward;
#[cfg(feature = "cuda")]
mod cuda;
mod error;
mod init;
pub mod ops;
mod schedule;
mod training;

pub use adamw::{AdamW, AdamWConfig, ParameterGroup};
pub use backward::backward;
pub use defend_kernels::pool::release_memory;
pub use defend_random::Rng;
pub use error::Error;
pub use init::{normal, truncated_normal, xavier_uniform};
pub use schedule::{Schedule, half_cosine};
pub use training::{TensorCache, TrainingStep, rows_of, shuffled_batches};

/// The README's example runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
