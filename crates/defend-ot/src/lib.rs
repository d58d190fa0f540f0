//! Balanced assignment of features to prototypes by entropic optimal transport.
//!
//! Stage 1 of the method needs, for every patch of a batch, a distribution over prototypes such that
//! all prototypes are used equally: otherwise all patches collapse onto one (paper, section 3.1; SwAV).
//! The role is [`Assigner`]; [`SinkhornKnopp`] is the paper's choice.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use defend_ot::{Assigner, SinkhornKnopp};
//!
//! // Cosines of four patches with two prototypes; both halves of the batch get one prototype each.
//! let scores = Tensor::new(&[[0.9f32, 0.8], [0.9, 0.7], [0.6, 0.5], [0.5, 0.6]], &Device::Cpu)?;
//! let assignment = SinkhornKnopp::default().assign(&scores)?;
//! let used = assignment.sum(0)?.to_vec1::<f32>()?;
//! assert!((used[0] - 2.0).abs() < 0.2 && (used[1] - 2.0).abs() < 0.2);
//! # Ok::<(), defend_ot::Error>(())
//! ```

mod error;
mod kernel;
mod sinkhorn;

pub use error::Error;
pub use sinkhorn::SinkhornKnopp;

use candle_core::Tensor;

/// Role: turns scores of R features against K prototypes into assignments.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use defend_ot::{Assigner, Error};
///
/// /// Each patch to its nearest prototype, without any balance.
/// struct Nearest;
///
/// impl Assigner for Nearest {
///     fn assign(&self, scores: &Tensor) -> Result<Tensor, Error> {
///         let largest = scores.max_keepdim(1)?;
///         let first = scores.broadcast_eq(&largest)?.to_dtype(scores.dtype())?;
///         Ok(first.broadcast_div(&first.sum_keepdim(1)?)?)
///     }
/// }
///
/// let scores = Tensor::new(&[[0.9f32, 0.1], [0.2, 0.3]], &Device::Cpu)?;
/// assert_eq!(Nearest.assign(&scores)?.to_vec2::<f32>()?, [[1.0, 0.0], [0.0, 1.0]]);
/// # Ok::<(), Error>(())
/// ```
pub trait Assigner: Send + Sync {
    /// `scores`: `[R, K]`, larger is nearer; returns `[R, K]`, non-negative rows that sum to one, without
    /// a gradient.
    ///
    /// # Errors
    /// [`Error::Scores`] for another shape or scores that are not finite.
    fn assign(&self, scores: &Tensor) -> Result<Tensor, Error>;
}
