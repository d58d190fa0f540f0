//! What can go wrong in the distillation stage.

/// Errors of `defend-distill`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting lies outside its range.
    #[error("distill.{field} is {value}, expected {expected}")]
    Config {
        /// Name of the field.
        field: &'static str,
        /// Value that was given.
        value: String,
        /// What the field accepts.
        expected: &'static str,
    },
    /// Two tensors that must agree do not.
    #[error("{what} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// The tensor.
        what: &'static str,
        /// Its shape.
        found: Vec<usize>,
        /// The shape it must have.
        expected: Vec<usize>,
    },
    /// A backbone failed.
    #[error(transparent)]
    Vit(#[from] defend_vit::Error),
    /// The run failed: no images, a loss or gradient that is not finite, a checkpoint that does not fit.
    #[error(transparent)]
    Train(#[from] defend_train::Error),
    /// candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
