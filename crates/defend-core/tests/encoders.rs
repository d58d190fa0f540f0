//! Teachers that are no Vision Transformer of ours: all the closed form asks of them is tokens of some blocks.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

mod kinds;
mod small;

use std::sync::Arc;

use defend_core::data::{Memory, RgbImage};
use defend_core::prelude::*;
use defend_core::vit::{BackboneSpec, Encoder, Layer, Vit};
use defend_core::{Error, TeacherSource, Tensor};
use kinds::images;
use small::teacher;

fn scores(detector: &Detector, set: Memory) -> Vec<f64> {
    scan(detector, set, &mut Silent).expect("a scan").scores()
}

/// A model without CLS attention, without tensors to save.
struct Plain(Vit);

impl Encoder for Plain {
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
}

#[test]
fn an_encoder_is_enough() -> Result<(), Error> {
    let builder = || Defend::builder().teacher(TeacherSource::Encoder(Arc::new(Plain(teacher(7)))));
    let detector = builder().fit(images(0, 0..30, 0), &mut Silent)?.detector;
    let plain = Defend::builder().teacher(teacher(7));
    let plain = plain.fit(images(0, 0..30, 0), &mut Silent)?;
    let expected = scores(&plain.detector, images(3, 0..4, 0));
    assert_eq!(scores(&detector, images(3, 0..4, 0)), expected);
    let folder = tempfile::tempdir().unwrap();
    let saved = detector.save(folder.path().join("a.defend"));
    assert!(matches!(saved, Err(Error::NotSavable { role: "teacher" })));
    let masked = DefendConfig {
        dense: None,
        ..DefendConfig::masked()
    };
    let refused = builder()
        .config(masked)
        .fit(images(0, 0..4, 0), &mut Silent);
    assert!(matches!(
        refused.err(),
        Some(Error::Config {
            field: "student",
            ..
        })
    ));
    Ok(())
}

/// Gives NaN for dark images.
struct Blind(Vit);

impl Encoder for Blind {
    fn spec(&self) -> &BackboneSpec {
        self.0.spec()
    }

    fn intermediates(
        &self,
        images: &Tensor,
        blocks: &[usize],
    ) -> Result<Vec<Layer>, defend_core::vit::Error> {
        let mut layers = self.0.intermediates(images, blocks)?;
        let bright = images
            .mean((1, 2, 3))?
            .ge(-0.9)?
            .to_dtype(defend_core::DType::F32)?;
        for layer in &mut layers {
            layer.cls = layer.cls.broadcast_div(&bright.unsqueeze(1)?)?;
        }
        Ok(layers)
    }
}

#[test]
fn features_that_are_not_finite_name_the_image() -> Result<(), Error> {
    let dark = |mut set: Memory| -> Memory {
        set.push(String::from("dark"), RgbImage::new(32, 32), vec![]);
        set
    };
    let builder = || Defend::builder().teacher(TeacherSource::Encoder(Arc::new(Blind(teacher(7)))));
    let error = builder()
        .fit(dark(images(0, 0..5, 0)), &mut Silent)
        .err()
        .unwrap();
    assert!(
        matches!(&error, Error::NonFiniteFeatures { name } if name == "dark"),
        "{error}"
    );
    let detector = builder().fit(images(0, 0..5, 0), &mut Silent)?.detector;
    let error = scan(&detector, dark(images(0, 0..2, 0)), &mut Silent).unwrap_err();
    assert!(
        matches!(&error, Error::NonFiniteFeatures { name } if name == "dark"),
        "{error}"
    );
    Ok(())
}

/// Shows its last block alone, as some models of other libraries do.
struct LastOnly(Vit);

impl Encoder for LastOnly {
    fn spec(&self) -> &BackboneSpec {
        self.0.spec()
    }

    fn available_blocks(&self) -> Vec<usize> {
        vec![self.0.spec().architecture.depth - 1]
    }

    fn intermediates(
        &self,
        images: &Tensor,
        blocks: &[usize],
    ) -> Result<Vec<Layer>, defend_core::vit::Error> {
        assert!(
            blocks
                .iter()
                .all(|block| self.available_blocks().contains(block))
        );
        self.0.intermediates(images, blocks)
    }
}

#[test]
fn the_last_block_alone_is_enough() -> Result<(), Error> {
    let last = TeacherSource::Encoder(Arc::new(LastOnly(teacher(7))));
    let builder = Defend::builder().teacher(last);
    // So alike that patches count: those of the last block stand for the middle ones.
    let fitted = builder.fit(images(0, 0..30, 3), &mut Silent)?;
    let found = defend_core::scan_with_maps(&fitted.detector, images(4, 0..6, 0), &mut Silent)?;
    assert!(found.findings.iter().all(|f| f.novelty.map.is_some()));
    let novel = found.scores();
    let normal = scores(&fitted.detector, images(0, 40..46, 0));
    let mean = |scores: &[f64]| scores.iter().sum::<f64>() / scores.len() as f64;
    assert!(mean(&novel) > mean(&normal), "{novel:?} {normal:?}");
    Ok(())
}
