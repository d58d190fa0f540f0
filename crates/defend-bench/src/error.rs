//! What can go wrong in a benchmark.

use std::path::PathBuf;

/// Errors of `defend-bench`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {action} failed", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A configuration is no valid TOML, or names what does not exist.
    #[error("{}: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The parser's reason, with line and column.
        reason: String,
    },
    /// A record of a run is not what this version writes, or is of another run than it should be.
    #[error("{}: {reason}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A class that a protocol names is not in the data set.
    #[error("the data set \"{data}\" has no class \"{class}\", expected one of {known:?}")]
    UnknownClass {
        /// Name of the data set.
        data: String,
        /// The class that was asked for.
        class: String,
        /// The classes that there are.
        known: Vec<String>,
    },
    /// A protocol judges objects by their boxes, and there are none.
    #[error(
        "the data set \"{data}\" has no boxes around objects, expected one that has, such as VOC or COCO, for \"objects\""
    )]
    NoBoxes {
        /// Name of the data set.
        data: String,
    },
    /// An image cannot be read: the benchmark goes without it.
    #[error("\"{name}\" of the data set \"{data}\" is left out")]
    Image {
        /// Name of the data set.
        data: String,
        /// The image.
        name: String,
        /// Why.
        source: Box<defend_core::data::Error>,
    },
    /// An experiment cannot be scored.
    #[error(
        "{experiment}: {train} training images (and {leaks} that are among the test images), {normal} normal and {abnormal} abnormal \
         test images, expected at least one of each"
    )]
    EmptySplit {
        /// The experiment.
        experiment: String,
        /// Training images.
        train: usize,
        /// Further ones, left out since they are among the test images.
        leaks: usize,
        /// Normal test images.
        normal: usize,
        /// Abnormal test images.
        abnormal: usize,
    },
    /// A table cannot be made.
    #[error("{} holds no record of a run: run the benchmark first", path.display())]
    NoRuns {
        /// The folder.
        path: PathBuf,
    },
    /// A plot cannot be drawn.
    #[error("{}: {reason}", path.display())]
    Plot {
        /// The file.
        path: PathBuf,
        /// What the plotter said.
        reason: String,
    },
    /// A detector or one of its stages failed.
    #[error(transparent)]
    Core(#[from] defend_core::Error),
    /// A data set cannot be read.
    #[error(transparent)]
    Data(#[from] defend_core::data::Error),
    /// A backbone or its weights failed.
    #[error(transparent)]
    Vit(#[from] defend_core::vit::Error),
    /// A metric failed.
    #[error(transparent)]
    Metrics(#[from] defend_core::metrics::Error),
}

impl Error {
    /// For `map_err` on file operations.
    pub(crate) fn io(
        path: &std::path::Path,
        action: &'static str,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            path,
            action,
            source,
        }
    }
}
