//! Images, where they come from and how they become network input.
//!
//! A [`Dataset`] gives images with the classes of the objects they show, a [`Protocol`] splits it
//! into normal and abnormal, [`Preprocess`] resizes and normalises as the checkpoint was trained,
//! and [`Batches`] does the decoding ahead of the consumer.
//!
//! ```
//! use std::sync::Arc;
//! use defend_data::{Batches, ClassId, Dataset, Memory, MultiObject, Preprocess, Protocol};
//! use image::RgbImage;
//!
//! # fn main() -> Result<(), defend_data::Error> {
//! let mut scenes = Memory::new(vec!["dog".into(), "cat".into()]);
//! scenes.push("a", RgbImage::new(40, 30), vec![ClassId(0), ClassId(1)]);
//! scenes.push("b", RgbImage::new(30, 40), vec![ClassId(1)]);
//!
//! let normal = MultiObject { normal: vec![ClassId(0)] }.train(&scenes);
//! assert_eq!(normal, [0]);
//!
//! let preprocess = Preprocess::new(32, [0.5; 3], [0.5; 3]);
//! for batch in Batches::new(Arc::new(scenes), normal, preprocess.clone(), 8)? {
//!     for image in &batch.images {
//!         let mut input = vec![0.0; preprocess.input_len()];
//!         preprocess.normalize_into(image, &mut input)?;
//!         assert!((input[0] + 1.0).abs() < 1e-6);
//!     }
//! }
//! # Ok(())
//! # }
//! ```

mod batches;
mod cifar;
mod coco;
mod dataset;
mod decode;
mod error;
mod folder;
mod hash;
mod idx;
mod jpeg;
mod manifest;
mod memory;
mod mvtec;
mod preprocess;
mod protocol;
mod published;
mod region;
mod subset;
mod voc;
mod walk;

pub use batches::{Batch, Batches, Failure};
pub use cifar::{Cifar, CifarLabels};
pub use coco::{Coco, Crowd};
pub use dataset::{ClassId, Dataset, ObjectBox, Split};
pub use decode::{
    MAX_DECODED_BYTES, decode_image, decode_image_at_least, find_mask, read_image,
    read_image_at_least, write_png,
};
pub use error::Error;
pub use folder::{ClassFolder, ImageFolder};
pub use hash::{ContentHash, content_hash, content_hashes, leaks};
pub use idx::{FASHION_MNIST_CLASSES, Idx, MNIST_CLASSES};
pub use image::{GrayImage, RgbImage};
pub use manifest::{ListedPaths, Manifest};
pub use memory::Memory;
pub use mvtec::MvtecAd;
pub use preprocess::{Interpolation, Preprocess, ResizeMode};
pub use protocol::{AllVsOne, Label, MultiObject, Protocol};
pub use region::{Mask, Region};
pub use subset::Subset;
pub use voc::{Difficult, VOC_CLASSES, Voc};
pub use walk::{PassedOver, Reason};
