//! What can go wrong in the dense stage.

/// Errors of `defend-dense`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting lies outside its range.
    #[error("dense.{field} is {value}, expected {expected}")]
    Config {
        /// Name of the field.
        field: &'static str,
        /// Value that was given.
        value: String,
        /// What the field accepts.
        expected: &'static str,
    },
    /// There is nothing to train on.
    #[error("no images to tune on, expected at least one")]
    NoImages,
    /// The backbone has no trainable parameters.
    #[error("the backbone has no trainable blocks: load it with TrainScope::LastBlocks")]
    FrozenBackbone,
    /// Training ran away.
    #[error(
        "the dense loss is {loss} at step {step}: lower the learning rates or check the images"
    )]
    Diverged {
        /// Steps taken before.
        step: usize,
        /// The loss.
        loss: f64,
    },
    /// The backbone failed.
    #[error(transparent)]
    Vit(#[from] defend_vit::Error),
    /// The assignment failed.
    #[error(transparent)]
    Assign(#[from] defend_ot::Error),
    /// The optimiser failed.
    #[error(transparent)]
    Optimiser(#[from] defend_nn::Error),
    /// candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
