//! Values and gradients against timm, from `tools/golden_vit.py`.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use defend_vit::{
    Architecture, Backbone, BackboneSpec, Error, Grid, TokenSet, TrainScope, Trainable, Vit,
    Weights, pos_embed,
};

fn golden() -> HashMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/timm_small.safetensors");
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn model(golden: &HashMap<String, Tensor>, scope: TrainScope) -> Vit {
    let architecture = Architecture {
        image_size: 16,
        patch_size: 4,
        width: 32,
        depth: 3,
        heads: 4,
        mlp_width: 64,
        layer_norm_eps: 1e-6,
        classes: 5,
    };
    let tensors = golden
        .iter()
        .filter_map(|(name, t)| Some((name.strip_prefix("weights.")?.to_owned(), t.clone())))
        .collect();
    let weights = Weights::from_tensors(tensors, "golden");
    Vit::load(
        BackboneSpec::new(architecture),
        weights,
        scope,
        &Device::Cpu,
    )
    .unwrap()
}

/// Largest difference relative to the largest reference value.
fn relative(found: &Tensor, expected: &Tensor) -> f32 {
    assert_eq!(found.dims(), expected.dims());
    let largest = |t: &Tensor| {
        let top = t.abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        top.to_scalar::<f32>().unwrap()
    };
    largest(&(found - expected).unwrap()) / largest(expected)
}

fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f32, what: &str) {
    let error = relative(found, expected);
    assert!(error < tolerance, "{what}: relative error {error}");
}

#[test]
fn whole_images_match_timm() -> Result<(), Error> {
    let golden = golden();
    let vit = model(&golden, TrainScope::Frozen);
    let features = vit.features(&golden["images"])?;
    assert_close(&features.patches, &golden["patches"], 1e-5, "patches");
    assert_close(&features.cls, &golden["cls"], 1e-5, "CLS token");
    assert_close(&vit.logits(&features)?, &golden["logits"], 1e-5, "logits");
    assert_close(
        &features.cls_attention,
        &golden["cls_attention.2"],
        1e-5,
        "CLS attention",
    );
    Ok(())
}

#[test]
fn kept_tokens_match_timm() -> Result<(), Error> {
    let golden = golden();
    let vit = model(&golden, TrainScope::Frozen);
    let grid = Grid {
        rows: 4,
        columns: 4,
    };
    let keep = TokenSet::new(golden["keep"].to_dtype(DType::U32)?, grid)?;
    let features = vit.features_of(&golden["images"], &keep)?;
    assert_close(&features.patches, &golden["kept.patches"], 1e-5, "patches");
    assert_close(&features.cls, &golden["kept.cls"], 1e-5, "CLS token");
    assert_close(
        &features.cls_attention,
        &golden["kept.cls_attention"],
        1e-5,
        "CLS attention",
    );
    Ok(())
}

#[test]
fn other_input_sizes_match_timm() -> Result<(), Error> {
    let golden = golden();
    let features = model(&golden, TrainScope::Frozen).features(&golden["small_images"])?;
    assert_close(&features.patches, &golden["small.patches"], 1e-5, "patches");
    assert_close(&features.cls, &golden["small.cls"], 1e-5, "CLS token");
    Ok(())
}

#[test]
fn positional_embeddings_resize_as_in_pytorch() -> Result<(), Error> {
    let golden = golden();
    let square = |side| Grid {
        rows: side,
        columns: side,
    };
    let source = golden["pos_14"].reshape((196, 8))?;
    for (side, name) in [(6, "pos_6"), (20, "pos_20")] {
        let resized = pos_embed::resize(&source, square(14), square(side))?;
        assert_close(
            &resized,
            &golden[name].reshape((side * side, 8))?,
            1e-5,
            name,
        );
    }
    Ok(())
}

#[test]
fn gradients_of_the_trained_blocks_match_pytorch() -> Result<(), Error> {
    let golden = golden();
    let vit = model(&golden, TrainScope::LastBlocks(2));
    let prefix = vit.frozen_prefix(&golden["images"])?;
    assert!(
        !prefix.tokens.track_op(),
        "the frozen prefix must not record gradients"
    );
    let features = vit.features_from(&prefix)?;
    let loss = (features.patches.sqr()? * &golden["grad_weighting"])?.sum_all()?;
    let grads = loss.backward()?;
    let parameters = vit.parameters();
    assert_eq!(parameters.len(), 24);
    for (name, var) in parameters {
        let grad = grads
            .get(&var)
            .unwrap_or_else(|| panic!("{name} has no gradient"));
        assert_close(grad, &golden[&format!("grads.{name}")], 1e-4, &name);
    }
    Ok(())
}
