//! Agreement with scikit-learn, SciPy and NumPy (`tools/golden_metrics.py`).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

use defend_metrics::{auroc, auroc_interval, average_precision, f1_max, fpr_at_tpr, pro};
use ndarray::{Array1, Array2, ArrayView2};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
    pro: Pro,
}

#[derive(Deserialize)]
struct Case {
    scores: Vec<f64>,
    abnormal: Vec<bool>,
    auroc: f64,
    average_precision: f64,
    fpr_at_95: f64,
    f1_max: f64,
    delong_95: [f64; 2],
}

#[derive(Deserialize)]
struct Pro {
    maps: Vec<Vec<Vec<f64>>>,
    masks: Vec<Vec<Vec<bool>>>,
    #[serde(rename = "at_0.3")]
    at_limit: f64,
    at_1: f64,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/metrics.json")).expect("golden file")
}

fn close(found: f64, expected: f64, what: &str) {
    assert!(
        (found - expected).abs() < 1e-9,
        "{what}: {found}, expected {expected}"
    );
}

#[test]
fn figures() {
    for case in golden().cases {
        let (scores, abnormal) = (Array1::from(case.scores), Array1::from(case.abnormal));
        let (s, a) = (scores.view(), abnormal.view());
        close(auroc(s, a).unwrap(), case.auroc, "auroc");
        close(
            average_precision(s, a).unwrap(),
            case.average_precision,
            "average precision",
        );
        close(
            fpr_at_tpr(s, a, 0.95).unwrap(),
            case.fpr_at_95,
            "fpr at tpr",
        );
        close(f1_max(s, a).unwrap(), case.f1_max, "f1");
        let interval = auroc_interval(s, a, 0.95).unwrap();
        close(interval.low, case.delong_95[0], "low");
        close(interval.high, case.delong_95[1], "high");
    }
}

fn arrays<T: Copy>(images: &[Vec<Vec<T>>]) -> Vec<Array2<T>> {
    images
        .iter()
        .map(|rows| Array2::from_shape_fn((rows.len(), rows[0].len()), |(y, x)| rows[y][x]))
        .collect()
}

fn views<T>(arrays: &[Array2<T>]) -> Vec<ArrayView2<'_, T>> {
    arrays.iter().map(|array| array.view()).collect()
}

#[test]
fn per_region_overlap() {
    let golden = golden().pro;
    let (maps, masks) = (arrays(&golden.maps), arrays(&golden.masks));
    let found = |limit| pro(&views(&maps), &views(&masks), limit).unwrap();
    close(found(0.3), golden.at_limit, "pro at 0.3");
    close(found(1.0), golden.at_1, "pro at 1");
}
