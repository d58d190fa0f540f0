//! What the benchmarks share: random inputs, backbones of random weights, and a student's training step.
#![allow(
    missing_docs,
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "benchmarks, not an interface"
)]

use candle_core::{Device, Tensor};
use defend_distill::{DistillObjective, FeatureDistance};
use defend_nn::{Rng, backward, normal};
use defend_train::{AdamW, AdamWConfig, ParameterGroup};
use defend_vit::{Architecture, BackboneSpec, TokenSet, TrainScope, Trainable, Vit};

pub fn noise(shape: &[usize], seed: u64) -> Tensor {
    normal(shape, 1.0, &mut Rng::seed(seed), &Device::Cpu).expect("a tensor")
}

/// A backbone that trains.
pub fn random_vit(architecture: &Architecture) -> Vit {
    let spec = BackboneSpec::new(architecture.clone());
    Vit::random(spec, 0.0, &mut Rng::seed(0), &Device::Cpu).expect("a backbone")
}

/// The same, frozen.
pub fn frozen_vit(architecture: &Architecture) -> Vit {
    let vit = random_vit(architecture).copy(TrainScope::Frozen);
    vit.expect("a copy")
}

/// Everything that trains in one group.
pub fn parameter_group(vit: &Vit) -> ParameterGroup {
    ParameterGroup {
        parameters: vit.parameters(),
        // Small, so that a step repeated many times leaves the weights what they were.
        learning_rate: 1e-6,
        weight_decay: 0.05,
    }
}

/// A student's optimiser step on half of the patches, every other one.
pub struct StudentStep {
    pub student: Vit,
    images: Tensor,
    pub keep: TokenSet,
    target: Tensor,
    optimiser: AdamW,
}

impl StudentStep {
    /// How many patches the student sees.
    pub fn kept(architecture: &Architecture) -> usize {
        architecture.grid().patches() / 2
    }

    /// Indices of the patches that it sees, `[kept]`.
    pub fn seen(architecture: &Architecture) -> Vec<u32> {
        (0..Self::kept(architecture) as u32)
            .map(|i| 2 * i)
            .collect()
    }

    /// `images`: `[B, 3, H, W]`, `target`: `[B, kept, D]`.
    pub fn new(student: Vit, architecture: &Architecture, images: Tensor, target: Tensor) -> Self {
        let batch = images.dim(0).expect("a batch");
        let rows = vec![Self::seen(architecture); batch];
        let keep = TokenSet::from_rows(&rows, architecture.grid(), images.device());
        let config = AdamWConfig {
            beta2: 0.95,
            ..AdamWConfig::default()
        };
        let optimiser = AdamW::new(vec![parameter_group(&student)], config);
        Self {
            student,
            images,
            keep: keep.expect("tokens"),
            target,
            optimiser: optimiser.expect("an optimiser"),
        }
    }

    pub fn loss(&self) -> Tensor {
        let features = self
            .student
            .features_train(&self.images, Some(&self.keep), &mut Rng::seed(0))
            .expect("features");
        let distances = FeatureDistance::default().distances(&self.target, &features.patches);
        distances.expect("distances").mean_all().expect("a loss")
    }

    pub fn run(&mut self) {
        let grads = backward(&self.loss()).expect("gradients");
        self.optimiser.step(&grads, 1.0).expect("a step");
    }
}
