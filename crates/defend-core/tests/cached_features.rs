//! Features that are kept in a folder from fit to fit.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

mod small;
mod stripes;

use std::collections::HashMap;
use std::sync::Arc;

use defend_core::distill::DistillConfig;
use defend_core::prelude::*;
use defend_core::vit::{
    Backbone, BackboneSpec, Encoder, Features, Layer, Precision, TokenSet, Vit,
};
use defend_core::{Error, MaskedConfig, Student, Tensor};
use small::teacher;
use stripes::set;

fn config() -> DefendConfig {
    let distill = DistillConfig {
        epochs: 3,
        min_steps: 0,
        batch_size: 8,
        ..DistillConfig::default()
    };
    DefendConfig {
        dense: None,
        student: Student::Masked(MaskedConfig {
            distill,
            ..MaskedConfig::default()
        }),
        ..DefendConfig::default()
    }
}

/// A teacher that counts the images it sees.
struct Counting(Vit, std::sync::atomic::AtomicUsize);

impl Encoder for Counting {
    fn spec(&self) -> &BackboneSpec {
        self.0.spec()
    }

    fn intermediates(
        &self,
        images: &Tensor,
        blocks: &[usize],
    ) -> Result<Vec<Layer>, defend_core::vit::Error> {
        self.0.intermediates(images, blocks)
    }

    fn tensors(&self) -> Result<Option<HashMap<String, Tensor>>, defend_core::vit::Error> {
        self.0.tensors()
    }
}

impl Backbone for Counting {
    fn features(&self, images: &Tensor) -> Result<Features, defend_core::vit::Error> {
        let count = images.dim(0)?;
        self.1.fetch_add(count, std::sync::atomic::Ordering::SeqCst);
        self.0.features(images)
    }

    fn features_masked(
        &self,
        images: &Tensor,
        keep: &TokenSet,
    ) -> Result<Features, defend_core::vit::Error> {
        self.0.features_masked(images, keep)
    }
}

#[test]
fn kept_features_are_not_computed_again_and_change_nothing() -> Result<(), Error> {
    let folder = tempfile::tempdir().unwrap();
    let fit = |kept: bool| -> Result<(Vec<f64>, usize), Error> {
        let counting = Arc::new(Counting(teacher(7), 0.into()));
        let mut builder = Defend::builder()
            .teacher(defend_core::TeacherSource::Backbone(counting.clone()))
            .config(config());
        if kept {
            builder = builder.feature_folder(folder.path(), Precision::Full);
        }
        let detector = builder.fit(set(4, 8), &mut Silent)?.detector;
        let seen = counting.1.load(std::sync::atomic::Ordering::SeqCst);
        Ok((scan(&detector, set(4, 3), &mut Silent)?.scores(), seen))
    };
    let (plain, seen) = fit(false)?;
    let (first, again) = (fit(true)?, fit(true)?);
    assert_eq!((first.0, again.0), (plain.clone(), plain));
    // What is left is the scale of the maps.
    assert_eq!((first.1, again.1), (seen, seen - 8));
    Ok(())
}
