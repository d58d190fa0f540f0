//! Three whole optimiser steps of the distillation against PyTorch, from `tools/golden_steps.py`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

use candle_core::{Device, Tensor};
use defend_distill::{DistillConfig, DistillRoles, Distiller, FeatureDistance, Mask, Selection};
use defend_nn::Rng;
use defend_testing::{Golden, assert_close, assert_moved};
use defend_train::{Schedule, Training};
use defend_vit::{Architecture, BackboneSpec, TrainScope, Vit, Weights};

fn vit(golden: &Golden, weights: &str, scope: TrainScope) -> Vit {
    let architecture = Architecture {
        image_size: 16,
        patch_size: 4,
        width: 16,
        depth: 3,
        heads: 2,
        mlp_width: 32,
        ..Architecture::vit_tiny()
    };
    let weights = Weights::from_tensors(golden.starting_with(weights), "golden");
    Vit::load(
        BackboneSpec::new(architecture),
        weights,
        scope,
        &Device::Cpu,
    )
    .unwrap()
}

#[test]
fn three_steps_match_pytorch() {
    let golden = Golden::read(env!("CARGO_MANIFEST_DIR"), "steps");
    let teacher = vit(&golden, "teacher.", TrainScope::Frozen);
    let student = vit(&golden, "student.", TrainScope::All);
    let mask = Mask::KeepSalient {
        ratio: 0.5,
        selection: Selection::TopK,
    };
    let config = DistillConfig {
        epochs: 3,
        batch_size: 4,
        learning_rate: 1e-2,
        schedule: Schedule::Cosine {
            warmup: 1.0 / 3.0,
            floor: 0.01,
        },
        ..DistillConfig::default()
    };
    let mut losses = Vec::new();
    Distiller::new(config)
        .unwrap()
        .distill(
            DistillRoles {
                teacher: &teacher,
                student: &student,
                mask: &mask,
                objective: &FeatureDistance::default(),
            },
            &golden.get("images"),
            Training::new(&mut Rng::seed(0), &mut |step| {
                losses.push(step.loss);
                std::ops::ControlFlow::Continue(())
            }),
        )
        .unwrap();
    let losses = Tensor::new(losses, &Device::Cpu).unwrap();
    assert_close(&losses, &golden.get("losses"), 1e-5, "losses");

    let (before, after) = (
        golden.starting_with("student."),
        student.state_dict().unwrap(),
    );
    let expected = golden.starting_with("after.");
    assert_eq!(after.len(), expected.len());
    for (name, expected) in expected {
        assert_moved(&name, &before[&name], &after[&name], &expected, 5e-3);
    }
}
