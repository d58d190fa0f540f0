//! Differentiable fused operations of Vision Transformers for candle, the backward pass that knows them, and seeded initialisers.
//!
//! candle's own fused `softmax_last_dim` and `layer_norm` have no backward pass and drop gradients
//! without an error; the operations in [`ops`] have one, proven against PyTorch and finite
//! differences, and run at the speed of the processor's matrix units on `f32` CPU tensors. On CUDA most have kernels too; on any
//! other device or type the same functions compose candle's differentiable primitives.

mod gradient_routing;
mod init;
pub mod ops;

pub use defend_kernels::pool::release_memory;
pub use defend_random::{Position, Rng};
pub use gradient_routing::backward;
pub use init::{normal, truncated_normal, xavier_uniform};

/// The README's example runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
