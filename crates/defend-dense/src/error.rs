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
    /// The backbone has no trainable parameters.
    #[error("the backbone has no trainable blocks: load it with TrainScope::LastBlocks")]
    FrozenBackbone,
    /// The backbone failed.
    #[error(transparent)]
    Vit(#[from] defend_vit::Error),
    /// The assignment failed.
    #[error(transparent)]
    Assign(#[from] defend_ot::Error),
    /// The run failed: no images, a loss or gradient that is not finite, a checkpoint that does not fit.
    #[error(transparent)]
    Train(#[from] defend_train::Error),
    /// candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
