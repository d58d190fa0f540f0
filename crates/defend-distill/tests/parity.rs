//! Distances and their gradients against PyTorch, from `tools/golden_distill.py`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

use candle_core::{DType, Var};
use defend_distill::{DistillObjective, FeatureDistance, FeatureNorm, NormalizedSide, Penalty};
use defend_testing::{Golden, assert_close};

#[test]
fn every_variant_matches_pytorch() {
    let golden = Golden::read(env!("CARGO_MANIFEST_DIR"), "distill");
    let sides = [
        ("both", NormalizedSide::Both),
        ("teacher", NormalizedSide::Teacher),
    ];
    let penalties = [
        ("squared", Penalty::Squared),
        ("smooth_l1", Penalty::SmoothL1),
    ];
    let norms = [
        ("none", FeatureNorm::None),
        ("layer", FeatureNorm::Layer),
        ("l2", FeatureNorm::L2),
    ];
    for (side_name, side) in sides {
        for (penalty_name, penalty) in penalties {
            for (norm_name, norm) in norms {
                let name = format!("{side_name}.{penalty_name}.{norm_name}");
                let get = |part: &str| golden.get(&format!("{name}.{part}"));
                let student = Var::from_tensor(&golden.get("student")).unwrap();
                let distance = FeatureDistance {
                    norm,
                    side,
                    penalty,
                };
                let distances = distance
                    .distances(&golden.get("teacher"), &student)
                    .unwrap();
                assert_close(&distances, &get("distance"), 1e-5, &name);
                let loss = distances.mean_all().unwrap();
                assert_close(&loss, &get("loss"), 1e-5, &name);
                let grads = loss.backward().unwrap();
                assert_close(grads.get(&student).unwrap(), &get("grad"), 1e-5, &name);
            }
        }
    }
}

/// Half precision backbones: distances are computed in f32 and the gradient comes back in the features' type.
#[test]
fn half_precision_features_are_compared_in_f32() {
    let golden = Golden::read(env!("CARGO_MANIFEST_DIR"), "distill");
    for half in [DType::F16, DType::BF16] {
        let run = |dtype: DType| {
            let features = |name: &str| {
                let rounded = golden.get(name).to_dtype(half).unwrap();
                rounded.to_dtype(dtype).unwrap()
            };
            let student = Var::from_tensor(&features("student")).unwrap();
            let distances = FeatureDistance::default()
                .distances(&features("teacher"), &student)
                .unwrap();
            assert_eq!(distances.dtype(), DType::F32);
            let grads = distances.mean_all().unwrap().backward().unwrap();
            (distances, grads.get(&student).unwrap().clone())
        };
        let ((distances, grad), (reference, reference_grad)) = (run(half), run(DType::F32));
        assert_close(&distances, &reference, 1e-6, "distances");
        assert_eq!(grad.dtype(), half);
        let rounding = if half == DType::F16 { 1e-3 } else { 8e-3 };
        assert_close(&grad, &reference_grad, rounding, "gradient");
    }
}
