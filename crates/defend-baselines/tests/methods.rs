//! Every method on a small random backbone: tells two textures apart, repeats bit for bit, and scores images alone as
//! in a batch.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may panic")]

use std::sync::Arc;

use defend_baselines::{MethodConfig, Teacher};
use defend_core::data::{Dataset, Memory, ResizeMode, RgbImage};
use defend_core::metrics::auroc;
use defend_core::nn::Rng;
use defend_core::prelude::*;
use defend_core::vit::{Architecture, BackboneSpec, CacheConfig, Vit};
use defend_core::{Observer, scan};
use ndarray::ArrayView1;

fn teacher() -> Teacher {
    let architecture = Architecture {
        image_size: 32,
        patch_size: 8,
        width: 32,
        depth: 4,
        heads: 2,
        mlp_width: 64,
        ..Architecture::vit_tiny()
    };
    let spec = BackboneSpec::new(architecture);
    let vit = Vit::random(spec, 0.0, &mut Rng::seed(3), &Device::Cpu).unwrap();
    Teacher::new(
        vit,
        4,
        ResizeMode::Squash,
        &Device::Cpu,
        CacheConfig::default(),
    )
    .unwrap()
}

/// Stripes that run one way or the other, each image with another width and shade.
fn images(count: u32, across: bool) -> Memory {
    let mut set = Memory::default();
    for i in 0..count {
        let period = 4 + i % 3;
        let image = RgbImage::from_fn(32, 32, |x, y| {
            let at = if across { x } else { y };
            let light = (at + i) % period < period / 2;
            let shade = if light { 220 } else { 30 + 5 * (i % 8) as u8 };
            [shade, shade / 2 + 40, 128].into()
        });
        set.push(format!("{i}"), image, vec![]);
    }
    set
}

fn scores(
    config: &MethodConfig,
    observer: &mut dyn Observer,
) -> (Vec<f64>, Box<dyn NoveltyDetector>) {
    let normal: Arc<dyn Dataset> = Arc::new(images(24, true));
    let detector = config
        .method()
        .fit(&teacher(), normal, 5, observer)
        .unwrap();
    let mut all = scan(&*detector, images(12, true), observer)
        .unwrap()
        .scores();
    all.extend(
        scan(&*detector, images(12, false), observer)
            .unwrap()
            .scores(),
    );
    (all, detector)
}

#[test]
fn every_method_tells_textures_apart_and_repeats() {
    let small = r#"[
        {"kind": "defend"},
        {"kind": "defend", "settings": {
            "dense": {"epochs": 1, "batch": 8, "crop_size": 16, "head_hidden": [16], "head_output": 8},
            "student": {"masked": {"distill": {"epochs": 40, "batch": 8}}}}},
        {"kind": "defend", "settings": {"student": {"masked": {"distill": {"epochs": 40, "batch": 8}}}}},
        {"kind": "defend", "whitened": true, "settings": {"student": {"masked": {"distill": {"epochs": 40, "batch": 8}}}}},
        {"kind": "nearest-neighbours"},
        {"kind": "nearest-neighbours", "token": "mean-patch"},
        {"kind": "mean-cls"},
        {"kind": "mahalanobis"},
        {"kind": "constant-student"},
        {"kind": "padim", "channels": 12},
        {"kind": "patch-core", "share": 0.2},
        {"kind": "kdad", "layers": 2, "epochs": 8, "batch": 8},
        {"kind": "transformaly", "layers": 3, "epochs": 8, "batch": 8},
        {"kind": "panda", "epochs": 2, "batch": 8},
        {"kind": "msad", "epochs": 2, "batch": 8},
        {"kind": "one-class-head", "hidden": 16, "output": 8, "epochs": 5}
    ]"#;
    let methods: Vec<MethodConfig> = serde_json::from_str(small).unwrap();
    let abnormal: Vec<bool> = (0..24).map(|i| i >= 12).collect();
    for config in methods {
        let name = config.method().name();
        let (first, detector) = scores(&config, &mut Silent);
        let area = auroc(ArrayView1::from(&first), ArrayView1::from(&abnormal)).unwrap();
        // The mean of a random backbone's features says next to nothing of textures; the VOC test measures these two.
        let is_mean = matches!(
            config,
            MethodConfig::MeanCls(_) | MethodConfig::ConstantStudent(_)
        );
        assert!(area > 0.7 || is_mean, "{name}: AUROC {area}");
        let (second, _) = scores(&config, &mut Silent);
        assert_eq!(first, second, "{name} with the same seed");

        // One image alone has the score that it has among others, up to rounding.
        let mut alone = Memory::default();
        alone.push("7", images(12, false).image(7).unwrap(), vec![]);
        let alone = scan(&*detector, alone, &mut Silent).unwrap().scores()[0];
        let among = first[12 + 7];
        assert!(
            (alone - among).abs() <= 1e-4 * among.abs().max(1e-3),
            "{name}: {alone} {among}"
        );
    }
}

#[test]
fn a_fit_without_images_is_an_error() {
    for config in MethodConfig::references() {
        let method = config.method();
        let normal: Arc<dyn Dataset> = Arc::new(Memory::default());
        let found = method.fit(&teacher(), normal, 0, &mut Silent);
        assert!(found.is_err(), "{}", method.name());
    }
}
