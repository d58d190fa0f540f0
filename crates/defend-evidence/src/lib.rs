//! The student in closed form: how novel an item is among others that are called normal, from the vectors that a frozen
//! network gives of each.
//!
//! A trained student fails where its teacher's features are unlike those it has learnt. An infinitely wide one, trained to
//! convergence, has an error that can be written down: the posterior variance of a Gaussian process. So nothing is trained
//! here. Three questions are asked of an image, each answered on the scale of the normal images' own *left-out values* (what
//! the rule says of a normal image that it has not seen, without a refit), and summed:
//!
//! 1. [`ExactPosterior`]: is it explained by the normal images?
//! 2. [`Contrast`]: is it more like them than like images in general, where the posterior finds that this matters?
//! 3. [`PatchMemory`]: is some small part unlike anything normal, where normal images are so alike that this decides?
//!
//! [`ClosedForm::maps`] show where the novelty is: what is broken ([`PatchMemory`]) or which object is novel ([`ObjectMemory`]).
//!
//! Who knows more can say more: [`ClosedForm::learn_abnormal`] takes known abnormal images, [`ClosedForm::together`] what many
//! images say of each other, [`ClosedForm::suspects`] names normal images that the others do not explain, and
//! [`ClosedForm::refit`] learns on and forgets.
//!
//! [`Groups`] make near copies count once. [`ClosedForm`] is the sum. Everything works on `ndarray` matrices, of images or
//! of anything else: see [`Embeddings`].

#![allow(
    clippy::needless_pass_by_value,
    reason = "views are handed over by value, as to ndarray's own functions"
)]

mod closed_form;
mod config;
mod contrast;
mod embeddings;
mod error;
mod faults;
mod groups;
mod judgement;
mod k_centre;
mod known;
mod linear;
mod objects;
mod patches;
mod posterior;
mod refit;
mod remember;
mod standard;
mod state;
mod suspects;
mod together;

pub use closed_form::{ClosedForm, Summary};
pub use config::{
    ContrastConfig, EvidenceConfig, KnownConfig, ObjectConfig, PatchConfig, PosteriorConfig,
    TogetherConfig,
};
pub use contrast::{Contrast, LeftOut, unlike_normals};
pub use embeddings::Embeddings;
pub use error::Error;
pub use faults::{FaultDirection, KnownFaults};
pub use groups::{Groups, kernel_width, leaders, nearest_leaders, similarity};
pub use judgement::{Judgement, Weighed};
pub use objects::ObjectMemory;
pub use patches::{CoreSet, PatchDistances, PatchMemory, PatchTokens};
pub use posterior::{ExactPosterior, Explained, LocalPosterior, NAMED_GROUPS};
pub use standard::Standard;
pub use state::{State, StateArray, StateHeader};
pub use suspects::Suspect;
pub use together::{Share, Together};

/// The README's example runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
