//! What can go wrong in the shared numeric layer.

/// Errors of `defend-nn`.
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
    /// A gradient is NaN or infinite; no parameter was changed by this step.
    #[error(
        "the gradient of \"{parameter}\" is not finite at step {step}: lower the learning rate or check the input images"
    )]
    NonFiniteGradient {
        /// Name of the parameter.
        parameter: String,
        /// Number of steps taken before.
        step: usize,
    },
    /// candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
