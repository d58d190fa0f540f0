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
        ("timm_deit3", 3, false),
        ("timm_reg_positions", 3, false),
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
    assert!(message.contains("name the family"), "{message}");
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
fn every_form_of_torch_save_is_read() -> Result<(), Error> {
    for name in ["archive.pt", "legacy.pt", "protocol4.pt"] {
        let mut weights = Weights::read(&folder("views").join(name))?;
        let turned = weights.take("turned", &[3, 2])?.to_vec2::<f32>()?;
        assert_eq!(turned, [[6.0, 9.0], [7.0, 10.0], [8.0, 11.0]], "{name}");
        for kind in ["half", "bfloat", "double"] {
            let values = weights.take(kind, &[3])?.to_vec1::<f32>()?;
            assert_eq!(values, [0.0, 1.0, 2.0], "{name} {kind}");
        }
        let parameter = weights.take("parameter", &[2])?.to_vec1::<f32>()?;
        assert_eq!(parameter, [0.0, 1.0], "{name}");
        let mut left: Vec<&str> = weights.names().collect();
        left.sort_unstable();
        assert_eq!(left, ["rows"], "{name}: integers are no weights");
    }
    Ok(())
}

#[test]
fn a_damaged_file_of_torch_save_is_an_error_or_other_values() {
    let copied = tempfile::tempdir().unwrap();
    let path = copied.path().join("weights.pt");
    for name in ["archive.pt", "legacy.pt"] {
        let whole = std::fs::read(folder("views").join(name)).unwrap();
        let mut ends_early = 0;
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            ends_early += usize::from(Weights::read(&path).is_err());
        }
        assert_eq!(ends_early, whole.len(), "{name}: every truncation is found");
        // Any byte may hold anything: no panic, no allocation beyond the file's size.
        for at in 0..whole.len() {
            for change in [0x01, 0x80, 0xff] {
                let mut changed = whole.clone();
                changed[at] ^= change;
                std::fs::write(&path, &changed).unwrap();
                let _ = Weights::read(&path);
            }
        }
    }
}

#[test]
fn a_model_in_parts_is_read_by_its_index() -> Result<(), Error> {
    let copied = tempfile::tempdir().unwrap();
    for file in ["config.json", "preprocessor_config.json"] {
        std::fs::copy(folder("hf_vit").join(file), copied.path().join(file)).unwrap();
    }
    let whole =
        candle_core::safetensors::load(folder("hf_vit").join("model.safetensors"), &Device::Cpu)?;
    let part = |name: &str| {
        format!(
            "model-0000{}-of-00002.safetensors",
            1 + usize::from(name.contains("layer.1"))
        )
    };
    let mut parts = std::collections::HashMap::<_, std::collections::HashMap<_, _>>::new();
    for (name, tensor) in &whole {
        parts
            .entry(part(name))
            .or_default()
            .insert(name.clone(), tensor.clone());
    }
    assert_eq!(parts.len(), 2);
    for (file, tensors) in &parts {
        candle_core::safetensors::save(tensors, copied.path().join(file))?;
    }
    let index = copied.path().join("model.safetensors.index.json");
    let write = |map: &std::collections::BTreeMap<String, String>| {
        let json = serde_json::json!({ "metadata": {}, "weight_map": map });
        std::fs::write(&index, json.to_string()).unwrap();
    };
    let map: std::collections::BTreeMap<_, _> =
        whole.keys().map(|n| (n.clone(), part(n))).collect();
    write(&map);
    let source = Pretrained::local(copied.path());
    check("hf_vit", &source.load(TrainScope::Frozen, &Device::Cpu)?)?;

    let refused = |map: &std::collections::BTreeMap<String, String>| {
        write(map);
        source
            .load(TrainScope::Frozen, &Device::Cpu)
            .unwrap_err()
            .to_string()
    };
    for outside in [
        "../model.safetensors",
        "/etc/passwd",
        "",
        "model.safetensors.index.json",
    ] {
        let mut map = map.clone();
        map.insert("vit.embeddings.cls_token".into(), outside.into());
        assert!(refused(&map).contains("folder of the index"), "{outside}");
    }
    let mut more = map.clone();
    more.insert("another".into(), part(""));
    assert!(refused(&more).contains("\"another\""));
    write(&map);
    std::fs::remove_file(copied.path().join(part("layer.1"))).unwrap();
    let error = source.load(TrainScope::Frozen, &Device::Cpu).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    Ok(())
}

#[test]
fn weights_of_fewer_blocks_than_promised_are_refused() {
    let copied = tempfile::tempdir().unwrap();
    let copy = |from: &str, file: &str, change: [&str; 2]| {
        let text = std::fs::read_to_string(folder(from).join(file)).unwrap();
        let changed = text.replace(change[0], change[1]);
        std::fs::write(copied.path().join(file), changed).unwrap();
        let weights = folder(from).join("model.safetensors");
        std::fs::copy(weights, copied.path().join("model.safetensors")).unwrap();
        let _ = std::fs::copy(
            folder(from).join("preprocessor_config.json"),
            copied.path().join("preprocessor_config.json"),
        );
        let source = Pretrained::local(copied.path());
        source
            .load(TrainScope::Frozen, &Device::Cpu)
            .map_err(|e| e.to_string())
    };
    let hugging_face = copy(
        "hf_vit",
        "config.json",
        ["\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3"],
    );
    let error = hugging_face.unwrap_err();
    assert!(error.contains("2 blocks") && error.contains('3'), "{error}");
    let named = copy("timm_deit3", "config.json", ["deit3_test", "deit3_small"]).unwrap_err();
    assert!(
        named.contains("2 blocks") && named.contains("12"),
        "{named}"
    );
    let said = copy(
        "timm_deit3",
        "config.json",
        ["\"num_heads\": 3", "\"num_heads\": 3, \"depth\": 4"],
    );
    assert!(said.unwrap_err().contains("2 blocks"));
    // The file's name says it where there is no configuration.
    let path = copied.path().join("dino_deitsmall16_pretrain.pth");
    std::fs::copy(folder("dino").join("checkpoint.pth"), &path).unwrap();
    let source = Pretrained::state_dict(&path, Family::Dino);
    let error = source.load(TrainScope::Frozen, &Device::Cpu).unwrap_err();
    assert!(error.to_string().contains("2 blocks"), "{error}");
}

#[test]
fn what_stands_in_place_of_weights_is_called_that() {
    let copied = tempfile::tempdir().unwrap();
    for (content, expected) in [
        (
            "version https://git-lfs.example/spec/v1\noid sha256:12\nsize 34\n",
            "Git LFS",
        ),
        (
            "\n <!DOCTYPE html><html><body>Not found</body></html>",
            "HTML",
        ),
        ("", "empty"),
        ("Not found", "not a complete weight file"),
    ] {
        for name in ["model.safetensors", "weights.pth"] {
            let path = copied.path().join(name);
            std::fs::write(&path, content).unwrap();
            let error = Weights::read(&path).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains(name), "{error}");
        }
    }
    // The content tells what a file is, not its name.
    let misnamed = copied.path().join("model.safetensors");
    std::fs::copy(folder("views").join("legacy.pt"), &misnamed).unwrap();
    assert!(Weights::read(&misnamed).unwrap().contains("turned"));
}

#[test]
fn a_path_that_does_not_exist_is_no_model_of_the_hub() {
    let error = Pretrained::parse("timm/vit_tiny").unwrap_err().to_string();
    assert!(
        error.contains("timm/vit_tiny") && error.contains("hub:"),
        "{error}"
    );
    assert!(matches!(
        Pretrained::parse(&folder("hf_vit").display().to_string()),
        Ok(Pretrained::Folder(_))
    ));
    for wrong in ["hub:", "hub:one", "hub:a/b/c", "hub:a/b@", "hub:./b"] {
        assert!(Pretrained::parse(wrong).is_err(), "{wrong}");
    }
    #[cfg(feature = "hub")]
    assert!(matches!(
        Pretrained::parse("hub:timm/tiny@v1.0"),
        Ok(Pretrained::Hub { model, revision }) if model == "timm/tiny" && revision == "v1.0"
    ));
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
