//! What the closed form costs beside its teacher's pass: `cargo bench -p defend-benches --bench evidence`.
//!
//! Noise in place of images: costs do not depend on the content, and the settings say whether patches count.
#![allow(
    missing_docs,
    clippy::expect_used,
    reason = "a benchmark, not an interface"
)]

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use candle_core::Tensor;
use criterion::{Criterion, criterion_group, criterion_main};
use defend_benches::{frozen_vit, noise};
use defend_core::data::{Dataset, Memory, RgbImage, Subset};
use defend_core::evidence::{ClosedForm, Embeddings, EvidenceConfig};
use defend_core::nn::Rng;
use defend_core::{
    Background, Defend, DefendConfig, Detector, MaskedConfig, NoveltyDetector, ProfileSet, Silent,
    Student,
};
use defend_vit::{Architecture, Encoder, TrainScope, Vit};
use ndarray::Array2;
use rand::RngExt;

/// Normal images of a fit, as many as VOC's train split has horses.
const NORMAL: usize = 309;

fn teacher() -> Vit {
    frozen_vit(&Architecture::vit_tiny())
}

/// Images of noise.
fn photos(count: usize) -> Memory {
    let mut rng = Rng::seed(1);
    let mut memory = Memory::default();
    for i in 0..count {
        let mut bytes = vec![0u8; 3 * 224 * 224];
        rng.fill(&mut bytes[..]);
        let image = RgbImage::from_raw(224, 224, bytes).expect("an image");
        memory.push(i.to_string(), image, vec![]);
    }
    memory
}

/// Images of noise look like any other noise: the contrast counts, in scores and in maps.
fn background() -> Background {
    static READY: OnceLock<Background> = OnceLock::new();
    let ready = READY.get_or_init(|| {
        let builder =
            Defend::builder().teacher(teacher().copy(TrainScope::Frozen).expect("a copy"));
        let photos = photos(1000);
        builder
            .look_at_background(photos, "noise", &mut Silent)
            .expect("a background")
    });
    ready.clone()
}

/// Settings under which patches count, or do not.
fn closed_form(patches: bool) -> DefendConfig {
    let mut evidence = EvidenceConfig::default();
    evidence.patches.alike_from = if patches { -2.0 } else { 2.0 };
    DefendConfig {
        student: Student::ClosedForm(evidence),
        ..DefendConfig::default()
    }
}

fn fitted(config: DefendConfig, normal: impl Dataset + 'static) -> Detector {
    let mut builder =
        Defend::builder().teacher(teacher().copy(TrainScope::Frozen).expect("a copy"));
    if let Student::ClosedForm(_) = config.student {
        builder = builder.background(background());
    }
    builder
        .config(config)
        .fit(normal, &mut Silent)
        .expect("a fit")
        .detector
}

fn scoring(c: &mut Criterion) {
    let (images, vit) = (noise(&[32, 3, 224, 224], 3), teacher());
    let normal = photos(NORMAL);
    let mut masked = MaskedConfig::default();
    masked.distill.epochs = 1;
    let masked = DefendConfig {
        student: Student::Masked(masked),
        ..DefendConfig::default()
    };
    let mut group = c.benchmark_group("score 32 images, ViT-Ti");
    group
        .sample_size(10)
        .measurement_time(Duration::from_secs(8));
    group.bench_function("one pass of the teacher", |b| {
        b.iter(|| vit.intermediates(&images, &[10, 11]).expect("tokens"));
    });
    let mut score = |name: &str, detector: &Detector, maps: bool| {
        group.bench_function(name, |b| {
            b.iter(|| {
                if maps {
                    detector.score_with_maps(&images)
                } else {
                    detector.score(&images)
                }
            });
        });
    };
    let plain = fitted(closed_form(false), normal.clone());
    score("closed form", &plain, false);
    score("closed form, with maps of objects", &plain, true);
    let patches = fitted(closed_form(true), normal.clone());
    score("closed form, patches count", &patches, false);
    score(
        "closed form, patches count, with maps of what is broken",
        &patches,
        true,
    );
    score("masked distillation", &fitted(masked, photos(32)), false);
    let profile = |i: usize| {
        let some = Subset::new(Arc::new(normal.clone()), (i..i + 64).collect()).expect("a part");
        (i.to_string(), fitted(closed_form(false), some))
    };
    let profiles = ProfileSet::new((0..50).map(profile).collect()).expect("one teacher");
    group.bench_function("50 closed forms of 64 images each in one pass", |b| {
        b.iter(|| profiles.score(&images).expect("scores"));
    });
    group.finish();
}

fn fitting(c: &mut Criterion) {
    let (normal, vit) = (photos(NORMAL), teacher());
    let images: Vec<Tensor> = (0..NORMAL.div_ceil(32))
        .map(|i| noise(&[32.min(NORMAL - 32 * i), 3, 224, 224], i as u64))
        .collect();
    let mut group = c.benchmark_group("fit, 309 images, ViT-Ti");
    group
        .sample_size(10)
        .measurement_time(Duration::from_secs(30));
    group.bench_function("one pass of the teacher", |b| {
        b.iter(|| {
            for batch in &images {
                vit.intermediates(batch, &[10, 11]).expect("tokens");
            }
        });
    });
    for (name, patches) in [("closed form", false), ("closed form, patches count", true)] {
        group.bench_function(name, |b| {
            b.iter(|| fitted(closed_form(patches), normal.clone()));
        });
    }
    group.finish();
}

/// The closed form alone, with normal and ordinary images in memory.
fn alone(c: &mut Criterion) {
    let mut rng = Rng::seed(2);
    let mut embeddings = |count: usize| {
        let mut part = || Array2::from_shape_simple_fn((count, 192), || rng.random::<f32>() - 0.5);
        Embeddings::new(vec![part(), part(), part()]).expect("embeddings")
    };
    let (normal, ordinary, queries) = (embeddings(1000), embeddings(1000), embeddings(32));
    let mut config = EvidenceConfig::default();
    config.patches.weight = 0.0;
    // Noise is as much like normal noise as any: the contrast counts.
    let form = ClosedForm::fit(&normal, Some(&ordinary), &config).expect("a fit");
    assert!(
        form.contrast_weight() > 0.0,
        "the contrast is part of the cost"
    );
    let mut group = c.benchmark_group("closed form alone, 1000 normal and 1000 ordinary images");
    group.sample_size(20);
    group.bench_function("score 32", |b| {
        b.iter(|| form.evaluate(&queries, None).expect("scores"));
    });
    let one = queries.select(&[0]);
    group.bench_function("score 1", |b| {
        b.iter(|| form.evaluate(&one, None).expect("scores"));
    });
    group.bench_function("fit", |b| {
        b.iter(|| ClosedForm::fit(&normal, Some(&ordinary), &config).expect("a fit"));
    });
    group.finish();
}

criterion_group!(benches, alone, scoring, fitting);
criterion_main!(benches);
