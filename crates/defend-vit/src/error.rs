//! What can go wrong with a backbone and its weights.

use std::path::PathBuf;

/// Errors of `defend-vit`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A weight file is damaged, or not of the kind that its name says.
    #[error("{origin} is not a complete weight file: {reason}")]
    Damaged {
        /// File or name of the weights.
        origin: String,
        /// What the reader found.
        reason: String,
    },
    /// A configuration file has no meaning for this backbone.
    #[error("{origin}: {reason}")]
    Config {
        /// File or name of the configuration.
        origin: String,
        /// What is wrong and what is expected.
        reason: String,
    },
    /// A tensor that the architecture needs is not in the file.
    #[error("{origin} has no tensor \"{name}\", expected with shape {expected:?}")]
    MissingTensor {
        /// File or name of the weights.
        origin: String,
        /// The tensor's name.
        name: String,
        /// Shape that the architecture asks for.
        expected: Vec<usize>,
    },
    /// A tensor has another shape than the architecture asks for.
    #[error("{origin}: tensor \"{name}\" has shape {found:?}, expected {expected:?}")]
    TensorShape {
        /// File or name of the weights.
        origin: String,
        /// The tensor's name.
        name: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape that the architecture asks for.
        expected: Vec<usize>,
    },
    /// The file holds tensors that this architecture does not use, so it is another model.
    #[error("{origin} holds tensors that this architecture does not use: {}", names.join(", "))]
    UnknownTensors {
        /// File or name of the weights.
        origin: String,
        /// Their names.
        names: Vec<String>,
    },
    /// The names of the tensors are of no known Vision Transformer.
    #[error(
        "{origin} is no Vision Transformer of timm, Hugging Face, DINO or DINOv2: no tensor is called cls_token; it holds {}",
        names.join(", ")
    )]
    UnknownLayout {
        /// File or name of the weights.
        origin: String,
        /// The names in the file.
        names: Vec<String>,
    },
    /// A tensor holds NaN or infinity.
    #[error("{origin}: tensor \"{name}\" holds NaN or infinite values")]
    NonFiniteTensor {
        /// File or name of the weights.
        origin: String,
        /// The tensor's name.
        name: String,
    },
    /// An input tensor has a shape that the backbone cannot take.
    #[error("images have shape {found:?}, expected {expected}")]
    Input {
        /// Shape of the input.
        found: Vec<usize>,
        /// What is accepted.
        expected: String,
    },
    /// A set of kept tokens does not fit the images.
    #[error("the token set keeps {found}, expected {expected}")]
    TokenSet {
        /// What the set holds.
        found: String,
        /// What would fit.
        expected: String,
    },
    /// The model hub did not deliver a file.
    #[error("model \"{model}\": cannot get {file} from the hub or its cache: {reason}")]
    Hub {
        /// Model id.
        model: String,
        /// File in the model's repository.
        file: String,
        /// What the hub client said.
        reason: String,
    },
    /// An image source could not give its images.
    #[error("cannot get image {index}")]
    ImageSource {
        /// Index that was asked for.
        index: usize,
        /// What the source said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
