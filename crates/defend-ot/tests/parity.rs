//! Sinkhorn-Knopp against an independent float64 implementation, from `tools/golden_ot.py`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

use defend_ot::{Assigner, SinkhornKnopp};
use defend_testing::{Golden, assert_close};

#[test]
fn assignments_match_swav() {
    let golden = Golden::read(env!("CARGO_MANIFEST_DIR"), "sinkhorn");
    let cases = [
        ("scores", "q", 0.05, 3),
        ("scores", "iterations_1", 0.05, 1),
        ("scores", "converged", 0.05, 500),
        ("bad_scores", "bad_q", 0.01, 3),
    ];
    for shape in ["tall", "wide"] {
        for (scores, expected, epsilon, iterations) in cases {
            let sinkhorn = SinkhornKnopp {
                epsilon,
                iterations,
            };
            let q = sinkhorn
                .assign(&golden.get(&format!("{shape}.{scores}")))
                .unwrap();
            let name = format!("{shape}.{expected}");
            assert_close(&q, &golden.get(&name), 1e-5, &name);
        }
    }
}
