//! A Vision Transformer that can really be fine-tuned on candle.
//!
//! It returns what novelty detection needs from an image: the patch tokens after the final norm, the
//! CLS token and the last block's CLS attention ([`Features`]); it runs on any subset of its tokens
//! ([`TokenSet`]), at any input size (the positional embedding is resized as PyTorch resizes it), and
//! reads timm checkpoints with the preprocessing that belongs to them ([`Pretrained`]).
//!
//! Other stages see a backbone only through its roles: [`Encoder`], [`Backbone`] and [`Trainable`].
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use defend_nn::Rng;
//! use defend_vit::{Architecture, Backbone, BackboneSpec, Vit};
//!
//! let spec = BackboneSpec::new(Architecture { width: 32, depth: 2, heads: 2, ..Architecture::vit_tiny() });
//! let student = Vit::random(spec, 0.1, &mut Rng::seed(0), &Device::Cpu)?;
//! let images = Tensor::zeros((2, 3, 224, 224), DType::F32, &Device::Cpu)?;
//! let features = student.features(&images)?;
//! assert_eq!(features.patches.dims(), [2, 196, 32]);
//! assert_eq!(features.cls_attention.dims(), [2, 2, 196]);
//! # Ok::<(), defend_vit::Error>(())
//! ```

mod assembly;
mod block;
mod cached;
mod checkpoint;
mod error;
mod feature_store;
mod features;
#[cfg(feature = "hub")]
mod hub;
mod int8;
mod layout;
mod local;
mod model_config;
mod patch_embed;
pub mod pos_embed;
mod pytorch;
mod shards;
mod spec;
mod variants;
mod vit;
mod weights;

pub use defend_nn::ops::ComputePrecision;

pub use cached::{CacheConfig, Cached, Precision};
pub use checkpoint::{Family, Pretrained, WeightPrecision};
pub use error::Error;
pub use feature_store::weights_hash;
pub use features::{
    Backbone, Encoder, Features, FrozenTokens, Grid, ImageSource, Layer, TokenSet, Trainable,
};
#[cfg(feature = "hub")]
pub use hub::hub_file;
pub use spec::{Architecture, BackboneSpec, Interpolation, Normalization};
pub use vit::{TrainScope, Vit};
pub use weights::Weights;

/// The README's example runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
