//! Distances and their gradients against PyTorch, from `tools/golden_distill.py`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

use candle_core::Var;
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
