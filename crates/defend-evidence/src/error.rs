//! What can go wrong with embeddings.

/// Errors of `defend-evidence`.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting has no meaning.
    #[error("{field} is {value}, expected {expected}")]
    Config {
        /// Name of the field.
        field: &'static str,
        /// Value that was given.
        value: String,
        /// What the field accepts.
        expected: &'static str,
    },
    /// There is nothing to learn from.
    #[error("{what} are empty, expected at least one image")]
    Empty {
        /// Which embeddings.
        what: &'static str,
    },
    /// A matrix does not fit the others.
    #[error("{what} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Which matrix.
        what: String,
        /// Its shape.
        found: Vec<usize>,
        /// Shape that would fit.
        expected: Vec<usize>,
    },
    /// An image was given as abnormal that is among the normal ones.
    #[error(
        "image {image} of the abnormal ones is also a normal one: forget it there first, or leave it out here"
    )]
    AlsoNormal {
        /// Its number among the abnormal ones.
        image: usize,
    },
    /// An image was given as normal that is known to be abnormal.
    #[error("image {image} of the normal ones is also a known abnormal one")]
    AlsoAbnormal {
        /// Its number among the new normal ones.
        image: usize,
    },
    /// A form does not keep what a change needs: a new fit on the images does it.
    #[error("this needs a new fit on the images: {reason}")]
    NeedsImages {
        /// Why.
        reason: &'static str,
    },
    /// A value is NaN or infinite.
    #[error("{what} of image {image} holds NaN or infinite values")]
    NotFinite {
        /// Which matrix.
        what: String,
        /// Row of the image.
        image: usize,
    },
    /// A matrix that is positive definite by construction could not be factorised.
    #[error(
        "the {what} of {images} images cannot be factorised: their features are not finite or far from unit length"
    )]
    Factorisation {
        /// Which matrix.
        what: &'static str,
        /// Its order.
        images: usize,
    },
    /// A saved state is incomplete or does not fit together.
    #[error("saved evidence: {reason}")]
    State {
        /// What is missing or wrong.
        reason: String,
    },
}
