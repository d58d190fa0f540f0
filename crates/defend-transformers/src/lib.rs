//! Vision models of `candle-transformers` as frozen teachers: behind [`Encoder`](defend_vit::Encoder), all that the closed form needs.
//!
//! | model | image embedding (`cls`) | patch tokens | blocks |
//! |---|---|---|---|
//! | [`ClipVision`] | CLS token | yes | all |
//! | [`SiglipVision`] | attention pooling | yes | the last |
//! | [`Eva02`] | mean of the patches, as its classifier takes it | yes | all |
//! | [`DinoV2`] | CLS token | yes, by a second pass | the last |
//! | [`DinoV2Registers`] | CLS token | none: one patch stands for the whole image | the last |
//!
//! What a model does not give, [`Encoder::available_blocks`](defend_vit::Encoder::available_blocks) says, and the closed form works
//! with what there is. For plain Vision Transformers, DINOv2 among them, [`defend_vit::Vit`] reads the same weights, gives every
//! block and CLS attention, trains, and is several times faster: use these types for the others, and to compare with.
//!
//! candle's types do not show their weights, so that a detector on one of these teachers cannot be saved: keep the normal images, or
//! their embeddings.

mod check;
mod clip;
mod dino;
mod eva;
mod files;
mod siglip;

pub use clip::ClipVision;
pub use dino::{DinoV2, DinoV2Registers};
pub use eva::Eva02;
pub use files::ModelFiles;
pub use siglip::SiglipVision;

/// The README's example runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
