//! A whole pre-norm transformer block as one operation, and several of them.
//!
//! | device and type | gradients | path |
//! |---|---|---|
//! | CPU, `f32`, several blocks, as many images as threads | none | [`chain`]: each image through all blocks by itself |
//! | CPU, `f32` | any | [`fused`]: the blocks as one operation |
//! | CUDA, `f32`, `bf16`, `f16` | any; in half precision LayerScale only without | `cuda`: kernels between cuBLAS's products |
//! | everything else | any | [`single`]: composed of this module's other operations |

mod chain;
#[cfg(feature = "cuda")]
mod cuda;
mod fused;
mod parameters;
mod single;
#[cfg(test)]
mod tests;

pub use chain::transformer_blocks;
pub use parameters::{BlockParameters, BranchFactors, ComputePrecision, Prepared};
pub use single::transformer_block;
