//! Novelty detection that knows what an object is: *does this image show what I have called normal,
//! even when other things are in it too?*
//!
//! The method of "Redefining Normal" (Salehi et al., ACCV 2024): a student learns the features that a frozen, pretrained Vision
//! Transformer has of normal images, and an image is novel where the student fails. By default the student is the
//! closed form of an infinitely wide one ([`evidence`]), so that a fit takes seconds, has a threshold at once and explains its
//! scores; [`Recipe::Paper`] is the paper's pipeline, in which the teacher is tuned and the student trained.
//!
//! ```no_run
//! use defend_core::prelude::*;
//!
//! let mut bar = ProgressBar::new();
//! let detector = Defend::builder()
//!     .teacher(Pretrained::hub("timm/vit_small_patch16_224.augreg_in21k_ft_in1k"))
//!     .device(best_device())
//!     .fit(ImageFolder::open("normal/")?, &mut bar)?
//!     .detector;
//! detector.save("dogs.defend")?;
//!
//! let detector = Detector::load("dogs.defend", &best_device())?;
//! let scan = scan(&detector, ImageFolder::open("new/")?, &mut bar)?;
//! for finding in &scan.findings {
//!     println!("{} {} {:?}", finding.name, finding.novelty.score, finding.novelty.verdict);
//! }
//! # Ok::<(), defend_core::Error>(())
//! ```
//!
//! Every stage is a crate of its own behind an object-safe role, and each can be replaced: see
//! [`DefendBuilder`]. They are re-exported here as [`vit`], [`ot`], [`dense`], [`distill`],
//! [`evidence`], [`data`], [`metrics`], [`train`] and [`nn`].

mod additions;
mod background;
mod builder;
mod calibrate;
mod calibration;
mod closed_fit;
mod closed_form;
mod config;
mod detector;
mod device;
mod error;
mod faults;
mod features;
mod files;
mod fit;
mod fit_checks;
mod fit_report;
mod input;
mod known;
mod map;
mod masked;
mod normal_images;
mod normals;
mod novelty;
mod novelty_detector;
mod observer;
mod one_image;
mod overlay;
mod persist;
mod profiles;
#[cfg(feature = "progress")]
mod progress;
mod regions;
mod resized_images;
mod saving;
mod scan;
mod sort;
mod suspects;
mod teacher;
mod tiles;
mod tokens;

pub use additions::Additions;
pub use background::{Background, BackgroundSource, TeacherIdentity};
pub use builder::{Defend, DefendBuilder, FitCheckpoints, TeacherSource};
pub use calibration::{Calibration, CalibrationSource};
pub use config::{DefendConfig, MaskedConfig, Recipe, Student};
pub use detector::Detector;
pub use device::best_device;
pub use error::Error;
pub use features::FeatureTable;
pub use fit_report::{ClosedFormReport, Fitted, StudentReport};
pub use input::preprocess_of;
pub use known::Learnt;
pub use map::{MapScale, PatchMap};
pub use novelty::{Explanation, NearestNormal, Novelty, Verdict};
pub use novelty_detector::NoveltyDetector;
pub use observer::{Event, Observer, Silent, Stage};
pub use overlay::overlay;
pub use profiles::{ProfileOutcome, ProfileSet};
#[cfg(feature = "progress")]
pub use progress::ProgressBar;
pub use regions::NovelRegion;
pub use resized_images::ResizedImages;
pub use scan::{Finding, Maps, Outcome, Scan, Skipped, scan, scan_each, scan_with_maps};

pub use sort::{Place, Sorted, SortedFinding, sort};
pub use suspects::SuspectImage;
pub use tiles::{TileMemory, Tiles};

pub use defend_data as data;
pub use defend_dense as dense;
pub use defend_distill as distill;
pub use defend_evidence as evidence;
pub use defend_metrics as metrics;
pub use defend_nn as nn;
pub use defend_ot as ot;
pub use defend_train as train;
#[cfg(feature = "transformers")]
pub use defend_transformers as transformers;
pub use defend_vit as vit;

pub use candle_core::{DType, Device, Tensor};

/// What most programs need.
pub mod prelude {
    #[cfg(feature = "progress")]
    pub use crate::ProgressBar;
    pub use crate::data::{Dataset, ImageFolder};
    pub use crate::metrics::FalseAlarmRate;
    pub use crate::vit::Pretrained;
    pub use crate::{
        Defend, DefendConfig, Detector, Device, NoveltyDetector, Silent, Verdict, best_device, scan,
    };
}

/// The small backbone that ships with the library: a ViT of width 192 and 8 blocks, distilled from
/// ViT-Ti/16 with this library (`examples/train_backbone`).
#[cfg(feature = "embedded")]
pub fn embedded_backbone() -> vit::Pretrained {
    vit::Pretrained::Bytes {
        name: "embedded backbone".into(),
        content: defend_tiny::WEIGHTS,
    }
}

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
