//! The references on Pascal VOC against figures measured in PyTorch (`tools/voc_reference.py`): they prove the
//! backbone, its weights and the preprocessing at once.
//!
//! `DEFEND_ASSETS=... cargo test -p defend-baselines --test voc -- --ignored`

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

use std::sync::Arc;

use defend_baselines::{SystemConfig, Teacher};
use defend_core::data::{Dataset, Difficult, Fit, Label, MultiObject, Protocol, Subset, Voc};
use defend_core::metrics::auroc;
use defend_core::prelude::*;
use defend_core::vit::{CacheConfig, TrainScope};
use ndarray::ArrayView1;

#[test]
#[ignore = "needs the asset folder: set DEFEND_ASSETS"]
fn references_of_the_horse_equal_pytorchs() {
    let assets = defend_testing::assets();
    let open = |split| {
        Arc::new(Voc::open(assets.join("VOCdevkit/VOC2012"), split, Difficult::Counted).unwrap())
    };
    let (train, test) = (open("train"), open("val"));
    let horse = MultiObject {
        normal: vec![train.class("horse").unwrap()],
    };
    let normal = Subset::new(train.clone(), horse.train(&*train)).unwrap();
    let weights = Pretrained::local(assets.join("weights/vit_tiny_patch16_224"));
    let vit = weights.load(TrainScope::Frozen, &Device::Cpu).unwrap();
    let teacher = Teacher::new(vit, 1, Fit::Squash, &Device::Cpu, CacheConfig::default()).unwrap();
    let normal: Arc<dyn Dataset> = Arc::new(normal);
    let abnormal: Vec<bool> = (0..test.len())
        .map(|i| horse.label(test.classes(i)) == Label::Abnormal)
        .collect();
    let expected = [0.983, 0.912, 0.985, 0.981, 0.857];
    for (reference, expected) in SystemConfig::references().iter().zip(expected) {
        let system = reference.system();
        let detector = system
            .fit(&teacher, normal.clone(), 0, &mut Silent)
            .unwrap();
        let scores = scan(&*detector, test.clone(), &mut Silent)
            .unwrap()
            .scores();
        let found = auroc(ArrayView1::from(&scores), ArrayView1::from(&abnormal)).unwrap();
        assert!(
            (found - expected).abs() < 0.0015,
            "{}: AUROC {found:.4}, PyTorch {expected}",
            system.name()
        );
    }
}
