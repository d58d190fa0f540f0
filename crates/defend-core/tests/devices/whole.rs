//! Whole fits and their files.

use std::sync::Arc;

use crate::place::*;
use crate::stripes::{set, small_dense};
use candle_core::Device;
use defend_core::dense::DenseConfig;
use defend_core::distill::DistillConfig;
use defend_core::prelude::*;
use defend_core::vit::{ComputePrecision, TrainScope};
use defend_core::{MaskedConfig, Student};

fn scores(detector: &Detector) -> Vec<f64> {
    let of = |period| scan(detector, set(period, 5), &mut Silent).unwrap();
    [of(3).scores(), of(5).scores()].concat()
}

/// One epoch of the dense stage and two of distillation.
fn short() -> DefendConfig {
    DefendConfig {
        dense: Some(DenseConfig {
            batch_size: 4,
            ..small_dense()
        }),
        student: Student::Masked(MaskedConfig {
            distill: DistillConfig {
                epochs: 2,
                batch_size: 4,
                ..DistillConfig::default()
            },
            ..MaskedConfig::default()
        }),
        ..DefendConfig::default()
    }
}

#[test]
fn a_whole_fit_and_its_file() {
    let run = |place: &Place| {
        let fitted = Defend::builder()
            .device(place.device.clone())
            .teacher(place.vit(1, TrainScope::Frozen))
            .student(Arc::new(place.vit(4, TrainScope::All)))
            .config(short())
            .fit(set(3, 8), &mut Silent)
            .unwrap();
        let distilled = fitted.distill().unwrap().losses.clone();
        (fitted.detector, fitted.dense.unwrap().losses, distilled)
    };
    let place = Place::best();
    let (found, expected) = (run(&place), run(&Place::reference()));
    all_close(&found.1, &expected.1, 1e-4, "losses of the dense stage");
    all_close(&found.2, &expected.2, 1e-4, "losses of the distillation");
    let before = scores(&found.0);
    all_close(&before, &scores(&expected.0), 1e-3, "scores");

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stripes.defend");
    found.0.save(&path).unwrap();
    let there = Detector::load(&path, &place.device).unwrap();
    assert_eq!(scores(&there), before);
    let home = Detector::load(&path, &Device::Cpu).unwrap();
    all_close(&scores(&home), &before, 1e-5, "scores of the loaded model");
}

#[test]
fn a_whole_fit_in_bf16_and_its_file() {
    let run = |place: &Place, compute_precision: ComputePrecision| {
        let config = DefendConfig {
            compute_precision,
            ..short()
        };
        let builder = Defend::builder()
            .device(place.device.clone())
            .teacher(place.vit(1, TrainScope::Frozen));
        let fitted = builder.config(config).fit(set(3, 8), &mut Silent);
        fitted.unwrap().detector
    };
    let place = Place::best();
    let found = run(&place, ComputePrecision::Bf16);
    let before = scores(&found);
    let expected = scores(&run(&place, ComputePrecision::F32));
    all_close(&before, &expected, 5e-2, "scores");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stripes.defend");
    found.save(&path).unwrap();
    let there = Detector::load(&path, &place.device).unwrap();
    assert_eq!(scores(&there), before);
    let home = Detector::load(&path, &Device::Cpu).unwrap();
    all_close(&scores(&home), &before, 2e-2, "scores of the loaded model");
}

/// The closed form itself is computed on the processor; its teacher is not.
#[test]
fn a_whole_fit_in_closed_form_and_its_file() {
    let run = |place: &Place, compute_precision: ComputePrecision| {
        let config = DefendConfig {
            compute_precision,
            ..DefendConfig::default()
        };
        let builder = Defend::builder()
            .device(place.device.clone())
            .teacher(place.vit(1, TrainScope::Frozen));
        let fitted = builder.config(config).fit(set(3, 8), &mut Silent);
        fitted.unwrap().detector
    };
    let place = Place::best();
    let found = run(&place, ComputePrecision::F32);
    let before = scores(&found);
    let expected = scores(&run(&Place::reference(), ComputePrecision::F32));
    all_close(&before, &expected, 1e-2, "scores");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stripes.defend");
    found.save(&path).unwrap();
    let there = Detector::load(&path, &place.device).unwrap();
    assert_eq!(scores(&there), before);
    let rounded = scores(&run(&place, ComputePrecision::Bf16));
    assert!(rounded.iter().all(|score| score.is_finite()));
}
