//! A whole pre-norm transformer block on slices: forward, and the backward pass written by hand.
//!
//! Activations between products are in [`crate::panel_layout`] layout, the block's input, output and residual sums row-major.
//! Work is cut into pieces of one image's rows, so that everything between two products stays in the cache, and a row's
//! result depends neither on the batch nor on the number of threads.

mod backward;
mod extents;
mod forward;
pub mod timed;

pub use backward::backward;
pub use extents::{Gradients, Matrices, Saved, Shape, Weights};
pub use forward::forward;
