//! Images per second of a ViT's forward pass and training step: `cargo bench -p defend-benches --bench vit`.
#![allow(
    missing_docs,
    clippy::expect_used,
    reason = "a benchmark, not an interface"
)]

use candle_core::{Device, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use defend_nn::{AdamW, AdamWConfig, ParameterGroup, Rng};
use defend_vit::{
    Architecture, Backbone, BackboneSpec, Grid, TokenSet, TrainScope, Trainable, Vit,
};

fn images(batch: usize) -> Tensor {
    let n = batch * 3 * 224 * 224;
    let values: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
    Tensor::from_vec(values, (batch, 3, 224, 224), &Device::Cpu).expect("a tensor")
}

fn vit(architecture: Architecture) -> Vit {
    let spec = BackboneSpec::new(architecture);
    Vit::random(spec, 0.0, &mut Rng::seed(0), &Device::Cpu).expect("a backbone")
}

fn forward(c: &mut Criterion) {
    let mut group = c.benchmark_group("forward");
    group.sample_size(10);
    for (name, architecture) in [
        ("ViT-Ti", Architecture::vit_tiny()),
        ("ViT-S", Architecture::vit_small()),
    ] {
        let vit = vit(architecture).copy(TrainScope::Frozen).expect("a copy");
        for batch in [1, 8, 32] {
            let images = images(batch);
            group.throughput(Throughput::Elements(batch as u64));
            group.bench_function(BenchmarkId::new(name, batch), |b| {
                b.iter(|| vit.features(&images).expect("features"));
            });
        }
    }
    group.finish();
}

fn step(c: &mut Criterion) {
    let mut group = c.benchmark_group("student step, 98 of 196 patches");
    group.sample_size(10);
    let grid = Grid {
        rows: 14,
        columns: 14,
    };
    for (name, architecture) in [
        ("ViT-Ti", Architecture::vit_tiny()),
        ("ViT-S", Architecture::vit_small()),
    ] {
        let vit = vit(architecture);
        let parameters = ParameterGroup {
            parameters: vit.parameters(),
            learning_rate: 1e-4,
            weight_decay: 0.05,
        };
        let mut optimiser =
            AdamW::new(vec![parameters], AdamWConfig::default()).expect("an optimiser");
        let batch = 16;
        let images = images(batch);
        let kept: Vec<u32> = (0..98).map(|i| 2 * i).collect();
        let keep = TokenSet::from_rows(&vec![kept; batch], grid, &Device::Cpu).expect("tokens");
        group.throughput(Throughput::Elements(batch as u64));
        group.bench_function(BenchmarkId::new(name, batch), |b| {
            b.iter(|| {
                let features = vit
                    .training_features(&images, Some(&keep), &mut Rng::seed(0))
                    .expect("features");
                let loss = features
                    .patches
                    .sqr()
                    .and_then(|t| t.mean_all())
                    .expect("a loss");
                let grads = loss.backward().expect("gradients");
                optimiser.step(&grads, 1.0).expect("a step");
            });
        });
    }
    group.finish();
}

criterion_group!(benches, forward, step);
criterion_main!(benches);
