//! What one step of AdamW does to a parameter: constants and operands.

use candle_core::{Tensor, Var};

/// Constants of one step of AdamW for parameters that share a learning rate and a weight decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Decay of the gradient's running mean.
    pub beta1: f64,
    /// Decay of the squared gradient's running mean.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Learning rate over the first moment's bias correction, `rate / (1 - beta1^t)`.
    pub step_size: f64,
    /// Bias correction of the second moment's root, `1 / sqrt(1 - beta2^t)`.
    pub second_correction: f64,
    /// What the weight decay leaves of a parameter, `1 - rate * decay`.
    pub keep: f64,
}

/// A parameter, its moments and its gradient.
#[derive(Debug, Clone, Copy)]
pub struct AdamWOperands<'a> {
    /// The parameter, changed in place.
    pub parameter: &'a Var,
    /// First and second moment, `[2, ...]` over the parameter's shape, changed in place.
    pub moments: &'a Var,
    /// Gradient of the parameter's shape.
    pub gradient: &'a Tensor,
}
