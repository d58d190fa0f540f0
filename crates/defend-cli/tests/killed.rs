//! A fit whose process is killed at any moment, and resumed: it ends with the bytes of a fit in peace.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic")]

use std::path::Path;

use defend_core::Device;
use defend_core::nn::Rng;
use defend_core::vit::{Architecture, BackboneSpec, Vit, WeightPrecision};
use defend_testing::in_peace_and_killed;
use image::{Rgb, RgbImage};

/// A backbone with random weights and 24 photos.
fn backbone_and_photos(folder: &Path) {
    let architecture = Architecture {
        image_size: 32,
        patch_size: 8,
        width: 24,
        depth: 3,
        heads: 2,
        mlp_width: 48,
        ..Architecture::vit_tiny()
    };
    let spec = BackboneSpec::new(architecture);
    let vit = Vit::random(spec, 0.2, &mut Rng::seed(1), &Device::Cpu).unwrap();
    let weights = vit.to_safetensors(WeightPrecision::F32).unwrap();
    std::fs::write(folder.join("teacher.safetensors"), weights).unwrap();
    std::fs::create_dir(folder.join("photos")).unwrap();
    for number in 0..24u32 {
        let photo = RgbImage::from_fn(48, 40, |x, y| {
            let phase = (x * (1 + number % 5) + y * (1 + number % 3) + number) as f32;
            let level = |channel: f32| (127.0 + 120.0 * (phase * 0.2 + channel).sin()) as u8;
            Rgb([level(0.0), level(1.0), level(2.5)])
        });
        let path = folder.join(format!("photos/{number:02}.png"));
        photo.save(path).unwrap();
    }
}

#[test]
fn a_fit_with_the_papers_recipe() {
    let folder = tempfile::tempdir().unwrap();
    backbone_and_photos(folder.path());
    let settings = r#"{
        "dense": {"epochs": 6, "batch_size": 8},
        "student": {"masked": {"distill": {"epochs": 40, "batch_size": 8}}}
    }"#;
    std::fs::write(folder.path().join("settings.json"), settings).unwrap();
    let arguments = [
        "fit",
        "--normal=photos",
        "--backbone=teacher.safetensors",
        "--config=settings.json",
    ];
    let checkpointing = [
        "--checkpoints=checkpoints",
        "--checkpoint-every=0",
        "--resume",
    ];
    let [peace, killed] = in_peace_and_killed(
        env!("CARGO_BIN_EXE_defend"),
        &arguments,
        &checkpointing,
        folder.path(),
    );
    assert!(peace == killed);
}
