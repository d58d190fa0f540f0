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

use defend_baselines::{Reference, References};
use defend_core::data::{Dataset, Difficult, Fit, Label, MultiObject, Protocol, Subset, Voc};
use defend_core::metrics::auroc;
use defend_core::prelude::*;
use defend_core::vit::{Backbone, ImageSource, TrainScope};
use defend_core::{Pictures, preprocess_of};
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
    let teacher: Arc<dyn Backbone> =
        Arc::new(weights.load(TrainScope::Frozen, &Device::Cpu).unwrap());
    let preprocess = preprocess_of(teacher.spec(), Fit::Squash);
    let references =
        References::fit(teacher, normal, Fit::Squash, &Device::Cpu, &mut Silent).unwrap();
    let pictures = Pictures::read(
        test.clone(),
        preprocess,
        &Device::Cpu,
        usize::MAX,
        true,
        &mut Silent,
    );
    let pictures = pictures.unwrap();
    let indices: Vec<usize> = (0..pictures.len()).collect();
    let mut scores = [const { Vec::new() }; 4];
    for batch in indices.chunks(32) {
        let found = references.score_all(&pictures.images(batch).unwrap());
        for (all, found) in scores.iter_mut().zip(found.unwrap()) {
            all.extend(found.into_iter().map(f64::from));
        }
    }
    let abnormal: Vec<bool> = (0..test.len())
        .map(|i| horse.label(test.classes(i)) == Label::Abnormal)
        .collect();
    let expected = [
        (Reference::NearestCls, 0.983),
        (Reference::NearestMeanPatch, 0.912),
        (Reference::MeanCls, 0.985),
        (Reference::ConstantStudent, 0.857),
    ];
    for ((reference, expected), scores) in expected.into_iter().zip(&scores) {
        let found = auroc(ArrayView1::from(scores), ArrayView1::from(&abnormal)).unwrap();
        assert!(
            (found - expected).abs() < 0.0015,
            "{}: AUROC {found:.4}, PyTorch {expected}",
            reference.name()
        );
    }
}
