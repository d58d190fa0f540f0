//! Values of random models against transformers and timm in PyTorch, from `tools/golden_transformers.py`, and of our own Vision
//! Transformer against candle's.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use defend_testing::{Golden, assert_close};
use defend_transformers::{ClipVision, DinoV2, DinoV2Registers, Eva02, ModelFiles, SiglipVision};
use defend_vit::{Backbone, Encoder, Error, Pretrained, TrainScope};
use serde_json::{Value, json};

/// Values in -1..1 that need no generator: a hash of the index.
fn noise(count: usize, seed: u32) -> Vec<f32> {
    let first = seed.wrapping_mul(1_000_003);
    let value = |i: usize| {
        let mut x = (i as u32).wrapping_add(first);
        for (shift, factor) in [(16, 0x7feb_352d), (15, 0x846c_a68b)] {
            x ^= x >> shift;
            x = x.wrapping_mul(factor);
        }
        x ^= x >> 16;
        (x >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(value).collect()
}

fn weight(kind: &str, shape: &[usize], seed: u32) -> Tensor {
    let inputs: usize = shape[1..].iter().product();
    let (shift, factor) = match kind {
        "scale" => (1.0, 0.2),
        "gamma" => (0.5, 0.2),
        "vector" => (0.0, 0.3),
        "matrix" => (0.0, (3.0 / inputs as f64).sqrt() as f32),
        other => panic!("kind {other}"),
    };
    let values = noise(shape.iter().product(), seed);
    let values: Vec<f32> = values.into_iter().map(|v| shift + factor * v).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn images(side: usize) -> Tensor {
    Tensor::from_vec(
        noise(2 * 3 * side * side, 99),
        (2, 3, side, side),
        &Device::Cpu,
    )
    .unwrap()
}

fn model(name: &str) -> Value {
    let models: Value = serde_json::from_str(include_str!("golden/models.json")).unwrap();
    models[name].clone()
}

fn tensors(model: &Value) -> HashMap<String, Tensor> {
    let entries = model["tensors"].as_array().unwrap().iter().zip(0..);
    let entry = |(entry, seed): (&Value, u32)| {
        let shape: Vec<usize> = serde_json::from_value(entry[1].clone()).unwrap();
        let tensor = weight(entry[2].as_str().unwrap(), &shape, seed);
        (entry[0].as_str().unwrap().to_owned(), tensor)
    };
    entries.map(entry).collect()
}

/// Writes a model as the hub's repositories hold it.
fn folder(name: &str) -> tempfile::TempDir {
    let (folder, model) = (tempfile::tempdir().unwrap(), model(name));
    let path = folder.path();
    candle_core::safetensors::save(&tensors(&model), path.join("model.safetensors")).unwrap();
    std::fs::write(path.join("config.json"), model["config"].to_string()).unwrap();
    folder
}

fn weights(folder: &Path) -> ModelFiles {
    ModelFiles::weights(folder.join("model.safetensors"))
}

fn check(name: &str, encoder: &dyn Encoder, blocks: &[usize], tolerance: f64) {
    let golden = Golden::read(env!("CARGO_MANIFEST_DIR"), "outputs");
    let side = encoder.spec().architecture.image_size;
    let layers = encoder.intermediates(&images(side), blocks).unwrap();
    assert_eq!(layers.len(), blocks.len());
    for (layer, block) in layers.iter().zip(blocks) {
        let what = format!("{name}.cls.{block}");
        assert_close(&layer.cls, &golden.get(&what), tolerance, &what);
        let found = layer.patches.dim(1).unwrap();
        assert_eq!(found, encoder.spec().architecture.grid().patches());
        if found > 1 {
            let what = format!("{name}.patches.{block}");
            let some = layer.patches.narrow(1, 0, 5).unwrap();
            assert_close(&some, &golden.get(&what), tolerance, &what);
        }
    }
    // Neither another size nor a block that there is not panics.
    let small = images(28);
    assert!(matches!(
        encoder.intermediates(&small, blocks),
        Err(Error::Config { .. })
    ));
    let none = encoder.intermediates(&images(side), &[99]);
    assert!(matches!(none, Err(Error::Config { .. })));
    assert!(
        encoder
            .intermediates(&images(side), &[])
            .unwrap()
            .is_empty()
    );
}

#[test]
fn clip_matches_transformers() -> Result<(), Error> {
    let folder = folder("clip");
    let clip = ClipVision::load(&ModelFiles::folder(folder.path()), &Device::Cpu)?;
    assert_eq!(clip.available_blocks(), [0, 1, 2]);
    check("clip", &clip, &[0, 2], 1e-5);
    Ok(())
}

#[test]
fn siglip_matches_transformers() -> Result<(), Error> {
    let folder = folder("siglip");
    let siglip = SiglipVision::load(&ModelFiles::folder(folder.path()), &Device::Cpu)?;
    check("siglip", &siglip, &[1], 1e-5);
    Ok(())
}

#[test]
fn eva02_matches_timm() -> Result<(), Error> {
    let folder = folder("eva02");
    let eva = Eva02::load(&weights(folder.path()), 2, 64, &Device::Cpu)?;
    check("eva02", &eva, &[0, 1], 2e-5);
    Ok(())
}

/// With GELU by tanh and, without registers, eps 1e-5, as candle has them where DINOv2 has the exact GELU and 1e-6.
#[test]
fn dinov2_matches_timm_with_and_without_registers() -> Result<(), Error> {
    let plain = folder("dinov2");
    let dino = DinoV2::load(&weights(plain.path()), [2, 32, 2], &Device::Cpu)?;
    check("dinov2", &dino, &[1], 1e-5);
    let with_registers = folder("dinov2_reg4");
    let files = weights(with_registers.path());
    let dino = DinoV2Registers::load(&files, [2, 32, 2], &Device::Cpu)?;
    check("dinov2_reg4", &dino, &[1], 1e-5);
    assert!(DinoV2::load(&weights(plain.path()), [2, 1024, 16], &Device::Cpu).is_err());
    Ok(())
}

/// The same weights in our own Vision Transformer, in candle's, and in PyTorch.
#[test]
fn our_vision_transformer_matches_candles_and_transformers() -> Result<(), Error> {
    let (folder, model) = (folder("vit"), model("vit"));
    let mut config = model["config"].clone();
    config["architectures"] = json!(["ViTForImageClassification"]);
    config["model_type"] = json!("vit");
    config["layer_norm_eps"] = json!(1e-12);
    config["hidden_act"] = json!("gelu");
    config["qkv_bias"] = json!(true);
    config["num_channels"] = json!(3);
    let labels: HashMap<String, String> = (0..7)
        .map(|i| (i.to_string(), format!("class {i}")))
        .collect();
    config["id2label"] = json!(labels);
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let preprocessor = json!({
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": {"height": 32, "width": 32}, "resample": 2
    });
    let path = folder.path().join("preprocessor_config.json");
    std::fs::write(path, preprocessor.to_string()).unwrap();
    let ours = Pretrained::local(folder.path()).load(TrainScope::Frozen, &Device::Cpu)?;
    let state = tensors(&model);
    let cls = ours.features(&images(32))?.cls;
    let logits = cls.matmul(&state["classifier.weight"].t()?)?;
    let found = logits.broadcast_add(&state["classifier.bias"])?;
    let config = serde_json::from_value(config).unwrap();
    let builder = VarBuilder::from_tensors(tensors(&model), DType::F32, &Device::Cpu);
    let theirs = candle_transformers::models::vit::Model::new(&config, 7, builder)?;
    assert_close(
        &found,
        &theirs.forward(&images(32))?,
        1e-5,
        "candle's logits",
    );
    let golden = Golden::read(env!("CARGO_MANIFEST_DIR"), "outputs");
    assert_close(&found, &golden.get("vit.logits"), 1e-5, "PyTorch's logits");
    Ok(())
}

#[test]
fn faults_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let load = || ClipVision::load(&ModelFiles::folder(folder.path()), &Device::Cpu).err();
    assert!(matches!(load(), Some(Error::Io { .. })));
    std::fs::write(folder.path().join("config.json"), "{\"hidden_size\": -1}").unwrap();
    let error = load().unwrap().to_string();
    assert!(error.contains("hidden_size is -1"), "{error}");
    std::fs::write(
        folder.path().join("config.json"),
        "{\"hidden_act\": \"gelu\"}",
    )
    .unwrap();
    let error = load().unwrap().to_string();
    assert!(error.contains("hidden_act is gelu"), "{error}");
    std::fs::write(folder.path().join("config.json"), "{}").unwrap();
    assert!(matches!(load(), Some(Error::Io { .. })));
    std::fs::write(folder.path().join("model.safetensors"), "no weights").unwrap();
    assert!(matches!(load(), Some(Error::Damaged { .. })));
}
