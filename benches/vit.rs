//! Images per second of a ViT's forward pass and training step: `cargo bench -p defend-benches --bench vit`.
#![allow(
    missing_docs,
    clippy::expect_used,
    reason = "a benchmark, not an interface"
)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use defend_benches::{StudentStep, frozen_vit, noise, random_vit};
use defend_vit::{Architecture, Backbone};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn models() -> [(&'static str, Architecture); 2] {
    [
        ("ViT-Ti", Architecture::vit_tiny()),
        ("ViT-S", Architecture::vit_small()),
    ]
}

fn forward(c: &mut Criterion) {
    let mut group = c.benchmark_group("forward");
    group.sample_size(10);
    for (name, architecture) in models() {
        let vit = frozen_vit(&architecture);
        for batch in [1, 8, 32] {
            let images = noise(&[batch, 3, 224, 224], 1);
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
    for (name, architecture) in models() {
        let batch = 16;
        let images = noise(&[batch, 3, 224, 224], 1);
        let target = noise(
            &[batch, StudentStep::kept(&architecture), architecture.width],
            2,
        );
        let student = random_vit(&architecture);
        let mut step = StudentStep::new(student, &architecture, images, target);
        group.throughput(Throughput::Elements(batch as u64));
        group.bench_function(BenchmarkId::new(name, batch), |b| b.iter(|| step.run()));
    }
    group.finish();
}

criterion_group!(benches, forward, step);
criterion_main!(benches);
