//! The real ViT-Ti against timm: values from `tools/golden_vit_tiny.py`, and its accuracy on photographs.
//!
//! `DEFEND_ASSETS=... cargo test -p defend-core --test vit_tiny -- --ignored --nocapture`

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use defend_core::data::{ImageFolder, ResizeMode};
use defend_core::prelude::*;
use defend_core::vit::{Backbone, Encoder, Grid, ImageSource, TokenSet, TrainScope, Vit};
use defend_core::{ResizedImages, preprocess_of};
use defend_testing::{Golden, assert_close, assets, largest};

fn golden() -> Golden {
    Golden::read(env!("CARGO_MANIFEST_DIR"), "vit_tiny")
}

fn weights() -> Pretrained {
    Pretrained::local(assets().join("weights/vit_tiny_patch16_224"))
}

fn model() -> Vit {
    weights().load(TrainScope::Frozen, &Device::Cpu).unwrap()
}

/// The made-up images of the script.
fn waves(batch_size: usize, side: usize) -> Tensor {
    let mut values = Vec::with_capacity(batch_size * 3 * side * side);
    for b in 0..batch_size {
        for c in 0..3 {
            for y in 0..side {
                for x in 0..side {
                    let [b, c, y, x] = [b, c, y, x].map(|i| i as f64);
                    let wave = (0.11 * y + 0.7 * c * b).sin()
                        * (0.07 * x * (1.0 + b) - 0.5 * c).cos()
                        + 0.3 * (0.9 * x).sin();
                    values.push(wave as f32);
                }
            }
        }
    }
    Tensor::from_vec(values, (batch_size, 3, side, side), &Device::Cpu).unwrap()
}

/// Patch tokens 0, 7, 14, ... of `[B, N, D]`.
fn every_seventh(patches: &Tensor) -> Tensor {
    let n = patches.dim(1).unwrap() as u32;
    let indices: Vec<u32> = (0..n).step_by(7).collect();
    let indices = Tensor::new(indices, &Device::Cpu).unwrap();
    patches.index_select(&indices, 1).unwrap()
}

#[test]
#[ignore = "needs the asset folder: set DEFEND_ASSETS"]
fn tokens_logits_and_attention_equal_timms() {
    let (golden, vit) = (golden(), model());
    let (full, small) = (waves(2, 224), waves(2, 96));
    for (name, images) in [("full", &full), ("small", &small)] {
        let features = vit.features(images).unwrap();
        let (cls, patches) = (format!("{name}.cls"), format!("{name}.patches"));
        assert_close(&features.cls, &golden.get(&cls), 1e-4, &cls);
        let found = every_seventh(&features.patches);
        assert_close(&found, &golden.get(&patches), 1e-4, &patches);
    }
    let classifier = weights().load_classifier(&Device::Cpu).unwrap();
    let logits = classifier.logits(&full).unwrap();
    assert_close(&logits, &golden.get("full.logits"), 1e-4, "logits");
    for block in 0..12 {
        let blocks: Vec<usize> = (0..=block).collect();
        let cut = vit.with_blocks(&blocks, "cut").unwrap();
        let attention = cut.features(&full).unwrap().cls_attention;
        let name = format!("attention.{block}");
        assert_close(&attention, &golden.get(&name), 1e-4, &name);
    }
}

#[test]
#[ignore = "needs the asset folder: set DEFEND_ASSETS"]
fn kept_tokens_equal_timms() {
    let golden = golden();
    let grid = Grid {
        rows: 14,
        columns: 14,
    };
    let keep = golden.get("kept.indices").to_dtype(DType::U32).unwrap();
    let keep = TokenSet::new(keep, grid).unwrap();
    let features = model().features_masked(&waves(2, 224), &keep).unwrap();
    assert_close(&features.cls, &golden.get("kept.cls"), 1e-4, "CLS token");
    let found = every_seventh(&features.patches);
    assert_close(&found, &golden.get("kept.patches"), 1e-4, "patches");
}

fn images(folder: &str, resize_mode: ResizeMode, vit: &Vit) -> ResizedImages {
    let set = Arc::new(ImageFolder::open(assets().join(folder)).unwrap());
    let preprocess = preprocess_of(vit.spec(), resize_mode);
    ResizedImages::read(set, preprocess, &Device::Cpu, usize::MAX, true, &mut Silent).unwrap()
}

/// Most likely classes of all images.
fn top(vit: &Vit, images: &ResizedImages) -> Vec<u32> {
    let all: Vec<usize> = (0..images.len()).collect();
    let batches = all.chunks(50).map(|batch| {
        let logits = vit.logits(&images.images(batch).unwrap()).unwrap();
        logits.argmax(1).unwrap().to_vec1::<u32>().unwrap()
    });
    batches.flatten().collect()
}

const CROP: ResizeMode = ResizeMode::CenterCrop { crop_pct: 0.9 };

/// Decoding and resizing differ from Pillow's by rounding; this is what is left of it in the CLS token.
#[test]
#[ignore = "needs the asset folder: set DEFEND_ASSETS"]
fn photos_give_the_cls_tokens_of_pillow_and_timm() {
    let (golden, vit) = (golden(), model());
    for (fit, name) in [
        (CROP, "photos.cls"),
        (ResizeMode::Squash, "photos.squashed_cls"),
    ] {
        let photos = images("parity", fit, &vit);
        let all: Vec<usize> = (0..photos.len()).collect();
        let cls = vit.features(&photos.images(&all).unwrap()).unwrap().cls;
        let expected = golden.get(name);
        let difference = (&cls - &expected).unwrap();
        let norm = |t: &Tensor| t.sqr().unwrap().sum(1).unwrap().sqrt().unwrap();
        let relative = (norm(&difference) / norm(&expected)).unwrap();
        let mean = relative.mean(0).unwrap().to_scalar::<f32>().unwrap();
        let worst = largest(&relative);
        println!("{name}: relative difference of the CLS token, mean {mean:.4}, worst {worst:.4}");
        assert!(
            mean < 0.02 && worst < 0.1,
            "{name}: mean {mean}, worst {worst}"
        );
    }
    let classifier = weights().load_classifier(&Device::Cpu).unwrap();
    let found = top(&classifier, &images("parity", CROP, &vit));
    let expected = golden.get("photos.top").to_vec1::<u32>().unwrap();
    assert_eq!(found, expected, "most likely classes");
}

#[test]
#[ignore = "needs the asset folder: set DEFEND_ASSETS"]
fn accuracy_on_the_imagenet_sample_is_timms() {
    let vit = weights().load_classifier(&Device::Cpu).unwrap();
    let photos = images("imagenet-sample", CROP, &vit);
    // One photo a class, sorted by name, and names start with the WordNet ids by which classes are numbered.
    let found = top(&vit, &photos);
    let right = found
        .iter()
        .enumerate()
        .filter(|&(class, &found)| found as usize == class)
        .count();
    let accuracy = right as f64 / found.len() as f64;
    println!("top-1 accuracy on {} photos: {accuracy:.3}", found.len());
    let expected = golden().get("sample.accuracy").to_vec1::<f32>().unwrap()[0];
    let difference = (accuracy - f64::from(expected)).abs();
    assert!(difference <= 0.005, "{accuracy}, timm's is {expected}");
}
