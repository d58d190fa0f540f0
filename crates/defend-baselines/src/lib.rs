//! The methods that the method is compared with, each on any backbone of this library and behind the same
//! [`NoveltyDetector`](defend_core::NoveltyDetector) role: from ten lines on untouched features to trained students.
//!
//! A [`Method`] learns from normal images with a [`Teacher`], whose features all methods share, and gives a detector:
//!
//! ```no_run
//! use defend_baselines::{PatchCore, Method, Teacher};
//! use defend_core::data::{ResizeMode, ImageFolder};
//! use defend_core::prelude::*;
//! use defend_core::vit::{CacheConfig, TrainScope};
//! use std::sync::Arc;
//!
//! let vit = Pretrained::hub("timm/vit_small_patch16_224.augreg_in21k_ft_in1k").load(TrainScope::Frozen, &Device::Cpu)?;
//! let teacher = Teacher::new(vit, 9, ResizeMode::Squash, &Device::Cpu, CacheConfig::default())?;
//! let normal = Arc::new(ImageFolder::open("normal/")?);
//! let detector = PatchCore::default().fit(&teacher, normal, 0, &mut Silent)?;
//! let scan = scan(&*detector, ImageFolder::open("new/")?, &mut Silent)?;
//! # Ok::<(), defend_core::Error>(())
//! ```
//!
//! What differs from each method's paper is told by [`Method::deviations`]. Not here yet, since they need other
//! backbones or generators: RD4AD and UniAD (feature pyramids of convolutional networks), CSI (a network trained from
//! random weights on rotated images), FITYMI (images from a generative model).

mod components;
mod config;
mod method;
mod methods;

pub use config::MethodConfig;
pub use method::{Method, Teacher};
pub use methods::kdad::Kdad;
pub use methods::msad::Msad;
pub use methods::one_class_head::OneClassHead;
pub use methods::ours::Ours;
pub use methods::padim::Padim;
pub use methods::panda::Panda;
pub use methods::patchcore::PatchCore;
pub use methods::simple::{ConstantStudent, Mahalanobis, MeanCls, NearestNeighbours, Token};
pub use methods::transformaly::Transformaly;
