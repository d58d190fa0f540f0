//! What can go wrong between a file and the network's input.

use std::path::PathBuf;

/// Errors of `defend-data`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder cannot be read.
    #[error("cannot read {path:?}: {source}")]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A folder cannot be walked.
    #[error("cannot list the folder {path:?}: {source}")]
    Walk {
        /// The folder that was opened.
        path: PathBuf,
        /// The reason, which names the entry at fault.
        source: walkdir::Error,
    },
    /// A folder holds no image.
    #[error("the folder {path:?} holds no image, expected {expected}")]
    NoImages {
        /// The folder.
        path: PathBuf,
        /// What should lie there.
        expected: &'static str,
    },
    /// A file of a published data set is not where its layout has it.
    #[error("{path:?} is missing: {help}")]
    Missing {
        /// The path that was looked for.
        path: PathBuf,
        /// What to download and where to put it.
        help: &'static str,
    },
    /// Images that a list names are not there.
    #[error("{missing} of the {total} images of {list:?} are not there: {}", first_of(first, *missing))]
    MissingImages {
        /// The list, or the file of annotations.
        list: PathBuf,
        /// How many are not there.
        missing: usize,
        /// How many it names.
        total: usize,
        /// The first of those that are not there, five at most.
        first: Vec<PathBuf>,
    },
    /// An image's file has no content.
    #[error("{origin:?} is empty, expected an image")]
    EmptyFile {
        /// Path or name of the image.
        origin: String,
    },
    /// The content of a file is no image that can be read.
    #[error(
        "{origin:?} is not an image in a known format: expected JPEG, PNG, WebP, BMP, GIF, TIFF or PNM"
    )]
    UnknownFormat {
        /// Path or name of the image.
        origin: String,
    },
    /// An image in a format that is not read.
    #[error(
        "{origin:?} is in the format {format}, which is not supported: convert it with {convert}"
    )]
    NotSupported {
        /// Path or name of the image.
        origin: String,
        /// Its format.
        format: &'static str,
        /// A command that converts it.
        convert: &'static str,
    },
    /// A JPEG ends before its last byte.
    #[error("{origin:?} is a truncated JPEG: its {bytes} bytes hold no end-of-image marker")]
    Truncated {
        /// Path or name of the image.
        origin: String,
        /// Length of the file.
        bytes: usize,
    },
    /// An image would fill the memory.
    #[error(
        "{origin:?} is {width} x {height} px and takes {bytes} bytes decoded, expected at most {limit}"
    )]
    TooLarge {
        /// Path or name of the image.
        origin: String,
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Memory for the decoded image.
        bytes: u64,
        /// Memory that is allowed.
        limit: u64,
    },
    /// An image cannot be decoded.
    #[error("cannot decode the image {origin:?}: {source}")]
    Decode {
        /// Path or name of the image.
        origin: String,
        /// The decoder's reason.
        source: image::ImageError,
    },
    /// A decoder failed in a way that its author did not foresee.
    #[error("the decoder gave up on the image {origin:?}: the file is damaged")]
    DecoderPanic {
        /// Path or name of the image.
        origin: String,
    },
    /// An image has no pixels.
    #[error("the image is {width} x {height} px, expected at least 1 x 1")]
    EmptyImage {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
    },
    /// An image is smaller than the tiles that it is to be cut into.
    #[error(
        "{width} x {height} px are to be cut into tiles of {smallest} px, expected at least one tile: use no tiles, or a smaller image size"
    )]
    TooSmall {
        /// Width of what is looked at, pixels.
        width: u32,
        /// Height of what is looked at, pixels.
        height: u32,
        /// Side of a tile, pixels.
        smallest: u32,
    },
    /// An image cannot be resized.
    #[error("cannot resize the image: {source}")]
    Resize {
        /// The resizer's reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// An image was not resized to the network's input.
    #[error(
        "the image is {width} x {height} px, expected {input_width} x {input_height}: resize it first"
    )]
    ImageSize {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Width of the network's input in pixels.
        input_width: u32,
        /// Height of the network's input in pixels.
        input_height: u32,
    },
    /// The region of interest is none of the image's, or damaged.
    #[error("the region of interest is {found}, expected {expected}")]
    Region {
        /// What it is.
        found: String,
        /// What it should be.
        expected: &'static str,
    },
    /// A buffer does not fit the network's input.
    #[error("the input buffer holds {found} values, expected {expected}: three for each pixel")]
    InputLength {
        /// Number of values.
        found: usize,
        /// Number of values that fits.
        expected: usize,
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
    /// A sample does not exist.
    #[error("sample {index} was asked for, but the data set holds {len}")]
    Index {
        /// The sample that was asked for, counted from 0.
        index: usize,
        /// Number of samples.
        len: usize,
    },
    /// An annotation is not well-formed XML.
    #[error("the annotation {path:?} is not well-formed XML: {source}")]
    Xml {
        /// The file.
        path: PathBuf,
        /// The parser's reason, with line and column.
        source: roxmltree::Error,
    },
    /// An annotation lacks what the VOC layout has, or names what it does not know.
    #[error("the annotation {path:?} holds {found}, expected {expected}")]
    Annotation {
        /// The file.
        path: PathBuf,
        /// What stands there.
        found: String,
        /// What should.
        expected: &'static str,
    },
    /// A file is not the idx file that it should be.
    #[error("the idx file {path:?} holds {found}, expected {expected}")]
    Idx {
        /// The file.
        path: PathBuf,
        /// What stands there.
        found: String,
        /// What should.
        expected: String,
    },
    /// A file of a published data set is not what its layout has there.
    #[error("the file {path:?} holds {found}, expected {expected}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What stands there.
        found: String,
        /// What should.
        expected: String,
    },
    /// A file is not JSON, or not the JSON that it should be.
    #[error("the JSON file {path:?} cannot be used: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's reason, with line and column.
        source: serde_json::Error,
    },
    /// A file is not CSV.
    #[error("the CSV file {path:?} cannot be used: {source}")]
    Csv {
        /// The file.
        path: PathBuf,
        /// The parser's reason, with the line.
        source: csv::Error,
    },
    /// An entry of a manifest lacks something or holds what no entry may.
    #[error("the manifest {path:?} holds {found} at {at}, expected {expected}")]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// The line of a CSV or the entry of a JSON list, both counted from 1; 0 for the file's name.
        at: usize,
        /// What stands there.
        found: String,
        /// What should.
        expected: &'static str,
    },
    /// A mask does not lie over its image.
    #[error(
        "the mask {path:?} is {width} x {height} px, expected {image_width} x {image_height} as its \
         image"
    )]
    MaskSize {
        /// The mask's file.
        path: PathBuf,
        /// Width of the mask in pixels.
        width: u32,
        /// Height of the mask in pixels.
        height: u32,
        /// Width of the image in pixels.
        image_width: u32,
        /// Height of the image in pixels.
        image_height: u32,
    },
    /// A text is no [`ContentHash`](crate::ContentHash).
    #[error("{found:?} is no content hash, expected 64 hexadecimal digits")]
    ContentHash {
        /// The text.
        found: String,
    },
    /// The thread that decodes ahead cannot be started.
    #[error("cannot start the thread that decodes images: {source}")]
    Thread {
        /// The operating system's reason.
        source: std::io::Error,
    },
}

/// Some paths, and dots when there are more.
fn first_of(paths: &[PathBuf], all: usize) -> String {
    let mut text: Vec<String> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    if all > paths.len() {
        text.push("...".into());
    }
    text.join(", ")
}
