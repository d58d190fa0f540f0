//! Cost of the stages around the backbone: `cargo bench -p defend-benches --bench stages`.
#![allow(
    missing_docs,
    clippy::expect_used,
    reason = "a benchmark, not an interface"
)]

use std::io::Cursor;

use candle_core::{Device, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use defend_data::{Preprocess, RgbImage, decode_image};
use defend_dense::{CropBox, DenseConfig, DenseObjective, PrototypeObjective};
use defend_distill::{DistillObjective, FeatureDistance};
use defend_nn::{Rng, normal};
use defend_ot::{Assigner, SinkhornKnopp};
use defend_vit::Grid;
use image::{ImageFormat, Rgb};

fn noise(shape: &[usize]) -> Tensor {
    normal(shape, 1.0, &mut Rng::seed(0), &Device::Cpu).expect("a tensor")
}

/// A batch of 32 views (6272 patches) against K prototypes.
fn sinkhorn(c: &mut Criterion) {
    let mut group = c.benchmark_group("Sinkhorn-Knopp, 6272 patches");
    for k in [20, 300] {
        let scores = noise(&[6272, k]).tanh().expect("scores");
        group.bench_function(BenchmarkId::from_parameter(k), |b| {
            b.iter(|| SinkhornKnopp::default().assign(&scores).expect("Q"));
        });
    }
    group.finish();
}

/// Head, assignment and cross-entropy with their gradients, for 8 views of ViT-Ti with 4 crops each.
fn dense_loss(c: &mut Criterion) {
    let config = DenseConfig::default();
    let objective = PrototypeObjective::random(&config, 192, &mut Rng::seed(0), &Device::Cpu)
        .expect("an objective");
    let (view, crops) = (noise(&[8, 196, 192]), noise(&[32, 36, 192]));
    let square = |side| Grid {
        rows: side,
        columns: side,
    };
    let boxes = [CropBox {
        row: 3,
        column: 4,
        height: 6,
        width: 6,
    }; 32];
    c.bench_function("dense loss and gradients, 8 views", |b| {
        b.iter(|| {
            let assigned = objective.assign(&view).expect("Q");
            let loss = objective.loss(&assigned, square(14), &crops, square(6), &boxes);
            loss.expect("a loss").backward().expect("gradients")
        });
    });
}

fn distance(c: &mut Criterion) {
    let (teacher, student) = (noise(&[32, 196, 192]), noise(&[32, 196, 192]));
    c.bench_function("feature distance, 32 images of ViT-Ti", |b| {
        b.iter(|| {
            FeatureDistance::default()
                .distances(&teacher, &student)
                .expect("distances")
        });
    });
}

fn pictures(c: &mut Criterion) {
    let picture = RgbImage::from_fn(640, 480, |x, y| Rgb([x as u8, y as u8, (x ^ y) as u8]));
    let mut jpeg = Cursor::new(Vec::new());
    picture
        .write_to(&mut jpeg, ImageFormat::Jpeg)
        .expect("a JPEG");
    let jpeg = jpeg.into_inner();
    let preprocess = Preprocess::new(224, [0.5; 3], [0.5; 3]);
    let mut group = c.benchmark_group("640 x 480 JPEG, one thread");
    group.throughput(Throughput::Elements(1));
    group.bench_function("decode", |b| {
        b.iter(|| decode_image(&jpeg, "bench").expect("a picture"));
    });
    group.bench_function("resize to 224", |b| {
        b.iter(|| preprocess.resize(&picture).expect("a picture"));
    });
    group.finish();
}

criterion_group!(benches, sinkhorn, dense_loss, distance, pictures);
criterion_main!(benches);
