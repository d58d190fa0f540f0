//! What can go wrong in an assignment.

/// Errors of `defend-ot`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The score matrix cannot be assigned.
    #[error("scores {found}, expected a finite matrix [features, prototypes]")]
    Scores {
        /// What was given.
        found: String,
    },
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
    /// candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
