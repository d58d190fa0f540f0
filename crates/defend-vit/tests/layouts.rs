//! Checkpoints as the reference libraries write them, and what these compute with them: from
//! `tools/golden_layouts.py`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

use std::path::{Path, PathBuf};

use candle_core::Device;
use defend_testing::{Golden, assert_close};
use defend_vit::{
    Backbone, Encoder, Error, Family, Interpolation, Normalization, Pretrained, TrainScope, Vit,
    Weights,
};

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/layouts")
        .join(name)
}

fn golden() -> Golden {
    Golden::read(env!("CARGO_MANIFEST_DIR"), "layouts")
}

fn check(name: &str, vit: &Vit) -> Result<(), Error> {
    let golden = golden();
    let features = vit.features(&golden.get("images"))?;
    for (part, found) in [
        ("patches", &features.patches),
        ("cls", &features.cls),
        ("cls_attention", &features.cls_attention),
    ] {
        let name = format!("{name}.{part}");
        assert_close(found, &golden.get(&name), 2e-5, &name);
    }
    // What we save is read back the same, whatever the layout was.
    let saved = tempfile::tempdir().unwrap();
    let path = saved.path().join("own.safetensors");
    std::fs::write(&path, vit.to_safetensors(defend_vit::WeightPrecision::F32)?).unwrap();
    let again = Pretrained::local(path).load(TrainScope::Frozen, &Device::Cpu)?;
    assert_eq!(again.spec(), vit.spec());
    let again = again.features(&golden.get("images"))?;
    assert_close(&again.patches, &features.patches, 0.0, "saved and read");
    Ok(())
}

#[test]
fn folders_of_timm_and_hugging_face() -> Result<(), Error> {
    for (name, heads, logits) in [
        ("timm_deit_distilled", 3, true),
        ("timm_dinov2_reg", 3, false),
        ("hf_vit", 3, true),
        ("hf_deit", 3, true),
        ("hf_dinov2", 3, false),
        ("hf_dinov2_plain", 3, false),
    ] {
        let source = Pretrained::local(folder(name));
        let vit = source.load(TrainScope::Frozen, &Device::Cpu)?;
        let spec = vit.spec();
        let architecture = &spec.architecture;
        assert_eq!(architecture.heads, heads);
        assert_eq!((architecture.depth, architecture.width), (2, 24));
        let (eps, normalization, interpolation) = if name.starts_with("hf") {
            let normalization = Normalization {
                mean: [0.5, 0.4, 0.3],
                std: [0.2, 0.3, 0.4],
            };
            let eps = if name.starts_with("hf_dinov2") {
                1e-6
            } else {
                1e-12
            };
            (eps, normalization, Interpolation::Bilinear)
        } else {
            (1e-6, Normalization::IMAGENET, Interpolation::Bicubic)
        };
        assert_eq!(architecture.layer_norm_eps, eps, "{name}");
        assert_eq!(spec.normalization, normalization);
        assert_eq!(spec.interpolation, interpolation);
        check(name, &vit)?;
        if logits {
            let golden = golden();
            let classifier = source.load_classifier(&Device::Cpu)?;
            let found = classifier.logits(&golden.get("images"))?;
            let name = format!("{name}.logits");
            assert_close(&found, &golden.get(&name), 2e-5, &name);
        }
    }
    Ok(())
}

#[test]
fn other_grids_resize_dinov2s_positions() -> Result<(), Error> {
    let golden = golden();
    for name in ["hf_dinov2", "hf_dinov2_plain"] {
        let vit = Pretrained::local(folder(name)).load(TrainScope::Frozen, &Device::Cpu)?;
        let features = vit.features(&golden.get("large_images"))?;
        let expected = golden.get(&format!("{name}.large_patches"));
        assert_close(&features.patches, &expected, 2e-5, name);
    }
    Ok(())
}

#[test]
fn a_training_checkpoint_of_dino_gives_its_teacher() -> Result<(), Error> {
    let path = folder("dino").join("checkpoint.pth");
    let source = Pretrained::state_dict(&path, Family::Dino);
    let vit = source.load(TrainScope::Frozen, &Device::Cpu)?;
    assert_eq!(vit.spec().normalization, Normalization::IMAGENET);
    assert_eq!(vit.spec().architecture.image_size, 16);
    check("dino", &vit)?;
    let without_family = Pretrained::local(&path).load(TrainScope::Frozen, &Device::Cpu);
    let message = without_family.unwrap_err().to_string();
    assert!(message.contains("state_dict"), "{message}");
    Ok(())
}

#[test]
fn views_of_one_storage_are_read_from_their_offsets() -> Result<(), Error> {
    let mut weights = Weights::read(&folder("views").join("views.pth"))?;
    let rows = weights.take("rows", &[2, 3])?.to_vec2::<f32>()?;
    assert_eq!(rows, [[4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]);
    let turned = weights.take("turned", &[3, 2])?.to_vec2::<f32>()?;
    assert_eq!(turned, [[6.0, 9.0], [7.0, 10.0], [8.0, 11.0]]);
    Ok(())
}

#[test]
fn what_is_unknown_or_damaged_is_named() {
    let copied = tempfile::tempdir().unwrap();
    let path = copied.path().join("weights.pth");
    let whole = std::fs::read(folder("dino").join("checkpoint.pth")).unwrap();
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let load = |path: &Path| {
        let source = Pretrained::state_dict(path, Family::Dino);
        source.load(TrainScope::Frozen, &Device::Cpu).unwrap_err()
    };
    let damaged = load(&path);
    assert!(matches!(damaged, Error::Damaged { .. }), "{damaged}");
    let missing = load(&copied.path().join("none.pth"));
    assert!(matches!(missing, Error::Io { .. }), "{missing}");

    let zeros = candle_core::Tensor::zeros(3, candle_core::DType::F32, &Device::Cpu).unwrap();
    let path = copied.path().join("other.safetensors");
    let tensors = std::collections::HashMap::from([("layer1.conv.weight", zeros)]);
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let unknown = load(&path);
    assert!(
        matches!(&unknown, Error::UnknownLayout { names, .. } if names == &["layer1.conv.weight"]),
        "{unknown}"
    );

    let config = copied.path().join("config.json");
    std::fs::copy(folder("hf_vit").join("config.json"), &config).unwrap();
    let weights = copied.path().join("model.safetensors");
    std::fs::copy(folder("hf_vit").join("model.safetensors"), &weights).unwrap();
    let source = Pretrained::local(copied.path());
    let error = source.load(TrainScope::Frozen, &Device::Cpu).unwrap_err();
    assert!(
        error.to_string().contains("preprocessor_config.json"),
        "{error}"
    );
}
