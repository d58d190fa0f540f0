//! Rendered images of several everyday objects each, to try novelty detection on without any data.
//!
//! [`render`] draws one scene, [`SceneSet`] the folders of a multi-object experiment: an image is
//! normal when it shows a given object, whatever else it shows. Same seed, same images.
//!
//! ```
//! use defend_scenes::{Object, SceneConfig, SceneSet};
//! use defend_data::Dataset;
//!
//! # fn main() -> Result<(), defend_scenes::Error> {
//! let set = SceneSet::render(&SceneConfig { train: 4, calibration: 2, test: 6, ..SceneConfig::default() })?;
//! assert_eq!(set.train.len(), 4);
//! assert_eq!(set.test_normal.len() + set.test_abnormal.len(), 6);
//! # Ok(())
//! # }
//! ```

mod canvas;
mod object;
mod scene;
mod set;

pub use object::Object;
pub use scene::{Placed, Scene, render};
pub use set::{SceneConfig, SceneSet};

/// Errors of `defend-scenes`.
#[derive(Debug, thiserror::Error)]
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
        expected: String,
    },
    /// An image could not be written.
    #[error("{}: the image could not be written", path.display())]
    Write {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A folder could not be made.
    #[error("{}: the folder could not be made", path.display())]
    Folder {
        /// The folder.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}
