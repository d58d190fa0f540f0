//! Values and gradients against timm, from `tools/golden_vit.py`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

use candle_core::{DType, Device, Tensor};
use defend_testing::{Golden, assert_close};
use defend_vit::{
    Architecture, Backbone, BackboneSpec, Encoder, Error, Grid, TokenSet, TrainScope, Trainable,
    Vit, Weights, pos_embed,
};

fn golden() -> Golden {
    Golden::read(env!("CARGO_MANIFEST_DIR"), "timm_small")
}

fn model(golden: &Golden, scope: TrainScope) -> Vit {
    let architecture = Architecture {
        image_size: 16,
        patch_size: 4,
        width: 32,
        depth: 3,
        heads: 4,
        mlp_width: 64,
        layer_norm_eps: 1e-6,
        classes: 5,
        ..Architecture::vit_tiny()
    };
    let weights = Weights::from_tensors(golden.starting_with("weights."), "golden");
    Vit::load(
        BackboneSpec::new(architecture),
        weights,
        scope,
        &Device::Cpu,
    )
    .unwrap()
}

/// Two threads, so that two of three images go through the frozen blocks by themselves.
#[test]
fn images_of_a_batch_are_those_alone() -> Result<(), Error> {
    let golden = golden();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build();
    let pool = pool.unwrap();
    let image = golden.get("images").narrow(0, 0, 1)?;
    let images = [&image, &(&image * 0.5)?, &(&image * 2.0)?];
    let batch = Tensor::cat(&images, 0)?;
    for layers in [1, 2, 3] {
        let vit = model(&golden, TrainScope::Frozen).with_layers(layers)?;
        let found = pool.install(|| vit.features(&batch))?;
        assert_eq!(found.intermediates.len(), layers - 1);
        let partly = model(&golden, TrainScope::LastBlocks(1)).with_layers(layers)?;
        let prefix = pool.install(|| partly.frozen_tokens(&batch))?;
        let from_prefix = partly.features_from_frozen(&prefix)?;
        for (i, image) in images.into_iter().enumerate() {
            let alone = pool.install(|| vit.features(image))?;
            let row = |tensor: &Tensor| tensor.narrow(0, i, 1);
            for found in [&found, &from_prefix] {
                assert_same(&row(&found.cls)?, &alone.cls);
                assert_same(&row(&found.patches)?, &alone.patches);
                assert_same(&row(&found.cls_attention)?, &alone.cls_attention);
                for (found, alone) in found.intermediates.iter().zip(&alone.intermediates) {
                    assert_same(&row(&found.cls)?, &alone.cls);
                    assert_same(&row(&found.patches)?, &alone.patches);
                }
            }
        }
    }
    Ok(())
}

fn assert_same(found: &Tensor, expected: &Tensor) {
    assert_eq!(found.dims(), expected.dims());
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(values(found), values(expected));
}

#[test]
fn whole_images_match_timm() -> Result<(), Error> {
    let golden = golden();
    let vit = model(&golden, TrainScope::Frozen);
    let features = vit.features(&golden.get("images"))?;
    assert_close(&features.patches, &golden.get("patches"), 1e-5, "patches");
    assert_close(&features.cls, &golden.get("cls"), 1e-5, "CLS token");
    assert_close(
        &vit.logits(&golden.get("images"))?,
        &golden.get("logits"),
        1e-5,
        "logits",
    );
    assert_close(
        &features.cls_attention,
        &golden.get("cls_attention.2"),
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
    let keep = TokenSet::new(golden.get("keep").to_dtype(DType::U32)?, grid)?;
    let features = vit.features_masked(&golden.get("images"), &keep)?;
    assert_close(
        &features.patches,
        &golden.get("kept.patches"),
        1e-5,
        "patches",
    );
    assert_close(&features.cls, &golden.get("kept.cls"), 1e-5, "CLS token");
    assert_close(
        &features.cls_attention,
        &golden.get("kept.cls_attention"),
        1e-5,
        "CLS attention",
    );
    Ok(())
}

#[test]
fn earlier_layers_are_the_blocks_outputs_after_the_final_norm() -> Result<(), Error> {
    let golden = golden();
    let vit = model(&golden, TrainScope::Frozen).with_layers(3)?;
    let features = vit.features(&golden.get("images"))?;
    let parameter = |name: &str| golden.get(&format!("weights.norm.{name}"));
    assert_eq!(features.intermediates.len(), 2);
    for (layer, block) in features.intermediates.iter().zip([1, 0]) {
        let tokens = golden.get(&format!("tokens.{block}"));
        let (weight, bias) = (parameter("weight"), parameter("bias"));
        let expected = defend_nn::ops::layer_norm(&tokens, &weight, &bias, 1e-6)?;
        let what = format!("block {block}");
        assert_close(
            &layer.cls,
            &expected.narrow(1, 0, 1)?.squeeze(1)?,
            1e-5,
            &what,
        );
        assert_close(&layer.patches, &expected.narrow(1, 1, 16)?, 1e-5, &what);
    }
    let too_many = model(&golden, TrainScope::Frozen).with_layers(4);
    assert!(matches!(too_many, Err(Error::Config { .. })));
    Ok(())
}

#[test]
fn other_input_sizes_match_timm() -> Result<(), Error> {
    let golden = golden();
    let features = model(&golden, TrainScope::Frozen).features(&golden.get("small_images"))?;
    assert_close(
        &features.patches,
        &golden.get("small.patches"),
        1e-5,
        "patches",
    );
    assert_close(&features.cls, &golden.get("small.cls"), 1e-5, "CLS token");
    Ok(())
}

#[test]
fn positional_embeddings_resize_as_in_pytorch() -> Result<(), Error> {
    let golden = golden();
    let square = |side| Grid {
        rows: side,
        columns: side,
    };
    let source = golden.get("pos_14").reshape((196, 8))?;
    for (side, name) in [(6, "pos_6"), (20, "pos_20")] {
        let resized =
            pos_embed::resize(&source, square(14), square(side), pos_embed::Bicubic::Plain)?;
        assert_close(
            &resized,
            &golden.get(name).reshape((side * side, 8))?,
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
    let prefix = vit.frozen_tokens(&golden.get("images"))?;
    assert!(
        !prefix.tokens.track_op(),
        "the frozen prefix must not record gradients"
    );
    let features = vit.features_from_frozen(&prefix)?;
    let loss = (features.patches.sqr()? * &golden.get("grad_weighting"))?.sum_all()?;
    let grads = loss.backward()?;
    let parameters = vit.parameters();
    assert_eq!(parameters.len(), 24);
    for (name, var) in parameters {
        let grad = grads
            .get(&var)
            .unwrap_or_else(|| panic!("{name} has no gradient"));
        assert_close(grad, &golden.get(&format!("grads.{name}")), 1e-4, &name);
    }
    Ok(())
}

#[test]
fn local_cls_tokens_match_timm() -> Result<(), Error> {
    let golden = golden();
    let vit = model(&golden, TrainScope::Frozen);
    for (images, expected) in [("images", "local"), ("small_images", "small.local")] {
        let images = golden.get(images);
        let (layers, local) = vit.layers_and_local_cls(&images, &[0, 2], 1, 1)?;
        assert_close(&local, &golden.get(expected), 1e-5, expected);
        // The whole image's pass goes on beside it.
        let plain = vit.intermediates(&images, &[0, 2])?;
        for (layer, plain) in layers.iter().zip(&plain) {
            assert_same(&layer.cls, &plain.cls);
            assert_same(&layer.patches, &plain.patches);
        }
    }
    let images = golden.get("images");
    // The last third of three blocks, two patches in each direction.
    let (_, local) = vit.intermediates_and_local(&images, &[2])?;
    let (_, expected) = vit.layers_and_local_cls(&images, &[], 2, 2)?;
    assert_same(&local.unwrap(), &expected);
    assert!(vit.layers_and_local_cls(&images, &[], 3, 1).is_err());
    assert!(vit.layers_and_local_cls(&images, &[3], 1, 1).is_err());
    Ok(())
}
