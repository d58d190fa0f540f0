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

use defend_baselines::{MethodConfig, Teacher};
use defend_core::data::{
    Dataset, Difficult, ImageFolder, Label, MultiObject, Protocol, ResizeMode, Subset, Voc,
};
use defend_core::evidence::EvidenceConfig;
use defend_core::metrics::auroc;
use defend_core::prelude::*;
use defend_core::vit::{CacheConfig, TrainScope, Vit};
use defend_core::{BackgroundSource, Student};
use ndarray::ArrayView1;

/// AUROC of the same rule in PyTorch and f64, to three decimals: the formulas of `tools/golden_evidence.py` on timm's tokens.
const HORSE: f64 = 0.987;
const SHEEP: f64 = 0.978;

/// One class of VOC's animals against the others.
struct Animals {
    normal: Arc<dyn Dataset>,
    test: Arc<Voc>,
    abnormal: Vec<bool>,
    vit: Vit,
}

impl Animals {
    fn read(class: &str) -> Self {
        let assets = defend_testing::assets();
        let root = assets.join("VOCdevkit/VOC2012");
        let open = |split| Arc::new(Voc::open(&root, split, Difficult::Counted).unwrap());
        let (train, test) = (open("train"), open("val"));
        let protocol = MultiObject {
            normal: vec![train.class(class).unwrap()],
        };
        let normal = Subset::new(train.clone(), protocol.train(&*train)).unwrap();
        let label = |i| protocol.label(test.classes(i)) == Label::Abnormal;
        let weights = Pretrained::local(assets.join("weights/vit_tiny_patch16_224"));
        Self {
            normal: Arc::new(normal),
            abnormal: (0..test.len()).map(label).collect(),
            vit: weights.load(TrainScope::Frozen, &Device::Cpu).unwrap(),
            test,
        }
    }
}

/// The default detector against the same rule in PyTorch, all training photos, one thousand photos of ImageNet beside them.
#[test]
#[ignore = "needs the asset folder: set DEFEND_ASSETS"]
fn the_closed_form_equals_pytorchs() {
    for (class, expected) in [("horse", HORSE), ("sheep", SHEEP)] {
        let animals = Animals::read(class);
        let photos = ImageFolder::open(defend_testing::assets().join("imagenet-sample")).unwrap();
        // The script's parts weigh the same.
        let mut evidence = EvidenceConfig::default();
        evidence.posterior.first_part = 1.0;
        let fitted = Defend::builder()
            .config(DefendConfig {
                student: Student::ClosedForm(evidence),
                ..DefendConfig::default()
            })
            .teacher(animals.vit)
            .background(BackgroundSource::Photos(
                Arc::new(photos),
                "ImageNet".into(),
            ))
            .fit(animals.normal, &mut Silent)
            .unwrap();
        let scores = scan(&fitted.detector, animals.test, &mut Silent)
            .unwrap()
            .scores();
        let found = auroc(
            ArrayView1::from(&scores),
            ArrayView1::from(&animals.abnormal),
        )
        .unwrap();
        println!("{class}: AUROC {found:.4}, PyTorch {expected}");
        assert!(
            (found - expected).abs() < 0.0025,
            "{class}: AUROC {found:.4}, PyTorch {expected}"
        );
    }
}

#[test]
#[ignore = "needs the asset folder: set DEFEND_ASSETS"]
fn references_of_the_horse_equal_pytorchs() {
    let Animals {
        normal,
        test,
        abnormal,
        vit,
    } = Animals::read("horse");
    let teacher = Teacher::new(
        vit,
        1,
        ResizeMode::Squash,
        &Device::Cpu,
        CacheConfig::default(),
    )
    .unwrap();
    let expected = [0.983, 0.912, 0.985, 0.981, 0.857];
    for (reference, expected) in MethodConfig::references().iter().zip(expected) {
        let method = reference.method();
        let detector = method
            .fit(&teacher, normal.clone(), 0, &mut Silent)
            .unwrap();
        let scores = scan(&*detector, test.clone(), &mut Silent)
            .unwrap()
            .scores();
        let found = auroc(ArrayView1::from(&scores), ArrayView1::from(&abnormal)).unwrap();
        assert!(
            (found - expected).abs() < 0.0015,
            "{}: AUROC {found:.4}, PyTorch {expected}",
            method.name()
        );
    }
}
