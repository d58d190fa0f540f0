//! Three whole optimiser steps of the dense stage against PyTorch, from `tools/golden_steps.py`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

use candle_core::{Device, Tensor};
use defend_dense::{
    Assignment, DenseConfig, DenseObjective, DenseTuner, ProjectionHead, PrototypeObjective,
};
use defend_nn::Rng;
use defend_ot::SinkhornKnopp;
use defend_testing::{Golden, assert_close, assert_moved};
use defend_train::Training;
use defend_vit::{Architecture, BackboneSpec, TrainScope, Vit, Weights};

#[test]
fn three_steps_match_pytorch() {
    let golden = Golden::read(env!("CARGO_MANIFEST_DIR"), "steps");
    let architecture = Architecture {
        image_size: 16,
        patch_size: 4,
        width: 16,
        depth: 3,
        heads: 2,
        mlp_width: 32,
        ..Architecture::vit_tiny()
    };
    let weights = golden.starting_with("weights.");
    let vit = Vit::load(
        BackboneSpec::new(architecture),
        Weights::from_tensors(weights.clone(), "golden"),
        TrainScope::LastBlocks(2),
        &Device::Cpu,
    )
    .unwrap();
    let layer = |i| {
        (
            golden.get(&format!("head.{i}.weight")),
            golden.get(&format!("head.{i}.bias")),
        )
    };
    let objective = PrototypeObjective::new(
        ProjectionHead::from_layers(&[layer(0), layer(1)]).unwrap(),
        &golden.get("prototypes"),
        Box::new(SinkhornKnopp::default()),
        Assignment::Hard,
        0.1,
    )
    .unwrap();
    let config = DenseConfig {
        epochs: 3,
        batch_size: 4,
        crops: 1,
        crop_size: 8,
        // The whole view: nothing is random.
        crop_area: [1.0, 1.0],
        crop_aspect: [1.0, 1.0],
        backbone_learning_rate: 1e-3,
        head_learning_rate: 1e-2,
        weight_decay: 0.05,
        ..DenseConfig::default()
    };
    let mut losses = Vec::new();
    DenseTuner::new(config)
        .unwrap()
        .tune(
            &vit,
            &objective,
            &golden.get("images"),
            Training::new(&mut Rng::seed(0), &mut |step| {
                losses.push(step.loss);
                std::ops::ControlFlow::Continue(())
            }),
        )
        .unwrap();
    let losses = Tensor::new(losses, &Device::Cpu).unwrap();
    assert_close(&losses, &golden.get("losses"), 1e-5, "losses");

    let state = vit.state_dict().unwrap();
    for (name, before) in &weights {
        if name.starts_with("blocks.1") || name.starts_with("blocks.2") {
            let expected = golden.get(&format!("after.{name}"));
            assert_moved(name, before, &state[name], &expected, 5e-4);
        }
    }
    for (name, var) in objective.parameters() {
        let (before, expected) = (golden.get(&name), golden.get(&format!("after.{name}")));
        assert_moved(&name, &before, var.as_tensor(), &expected, 5e-4);
    }
}
