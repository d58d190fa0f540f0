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
    /// There is nothing to train on.
    #[error("no images to distil on, expected at least one")]
    NoImages,
    /// Training ran away.
    #[error(
        "the distillation loss is {loss} at step {step}: lower the learning rate or check the images"
    )]
    Diverged {
        /// Steps taken before.
        step: usize,
        /// The loss.
        loss: f64,
    },
    /// A backbone failed.
    #[error(transparent)]
    Vit(#[from] defend_vit::Error),
    /// The optimiser failed.
    #[error(transparent)]
    Optimiser(#[from] defend_nn::Error),
    /// candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
