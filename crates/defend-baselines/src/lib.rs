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

mod adapted;
mod config;
mod gaussian;
mod kdad;
mod method;
mod middle;
mod msad;
mod neighbours;
mod one_class_head;
mod ours;
mod padim;
mod panda;
mod patchcore;
mod scored;
mod simple;
mod transformaly;

pub use config::MethodConfig;
pub use kdad::Kdad;
pub use method::{Method, Teacher};
pub use msad::Msad;
pub use one_class_head::OneClassHead;
pub use ours::Ours;
pub use padim::Padim;
pub use panda::Panda;
pub use patchcore::PatchCore;
pub use simple::{ConstantStudent, Mahalanobis, MeanCls, NearestNeighbours, Token};
pub use transformaly::Transformaly;
