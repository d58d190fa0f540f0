//! Cost of the stages around the backbone: `cargo bench -p defend-benches --bench stages`.
#![allow(
    missing_docs,
    clippy::expect_used,
    reason = "a benchmark, not an interface"
)]

use std::io::Cursor;

use candle_core::{Device, Tensor, Var};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use defend_benches::{StudentStep, frozen_vit, noise, parameter_group, random_vit};
use defend_data::{Preprocess, RgbImage, decode_image};
use defend_dense::{CropBox, DenseConfig, DenseObjective, PrototypeObjective};
use defend_distill::{DistillObjective, FeatureDistance};
use defend_kernels::transformer_block::timed::Timed;
use defend_nn::Rng;
use defend_ot::{Assigner, SinkhornKnopp};
use defend_train::{AdamW, AdamWConfig};
use defend_vit::{Architecture, Backbone, Grid, Trainable};
use image::{ImageFormat, Rgb};

/// A batch of 32 views (6272 patches) against K prototypes.
fn sinkhorn(c: &mut Criterion) {
    let mut group = c.benchmark_group("Sinkhorn-Knopp, 6272 patches");
    for k in [20, 300] {
        let scores = noise(&[6272, k], 0).tanh().expect("scores");
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
    let (view, crops) = (noise(&[8, 196, 192], 0), noise(&[32, 36, 192], 0));
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
    let (teacher, student) = (noise(&[32, 196, 192], 0), noise(&[32, 196, 192], 0));
    c.bench_function("feature distance, 32 images of ViT-Ti", |b| {
        b.iter(|| {
            FeatureDistance::default()
                .distances(&teacher, &student)
                .expect("distances")
        });
    });
}

fn images(c: &mut Criterion) {
    let image = RgbImage::from_fn(640, 480, |x, y| Rgb([x as u8, y as u8, (x ^ y) as u8]));
    let mut jpeg = Cursor::new(Vec::new());
    image
        .write_to(&mut jpeg, ImageFormat::Jpeg)
        .expect("a JPEG");
    let jpeg = jpeg.into_inner();
    let preprocess = Preprocess::new(224, [0.5; 3], [0.5; 3]);
    let mut group = c.benchmark_group("640 x 480 JPEG, one thread");
    group.throughput(Throughput::Elements(1));
    group.bench_function("decode", |b| {
        b.iter(|| decode_image(&jpeg, "bench").expect("an image"));
    });
    group.bench_function("resize to 224", |b| {
        b.iter(|| preprocess.resize(&image).expect("an image"));
    });
    group.finish();
}

/// Floating-point operations a second (an "element" is one): a block of ViT-S against what the multipliers can do.
fn products(c: &mut Criterion) {
    let arch = Architecture {
        depth: 1,
        ..Architecture::vit_small()
    };
    let (d, hidden, batch) = (arch.width, arch.mlp_width, 8);
    let tokens = arch.grid().patches() + 1;
    let maps = 2 * tokens * d * (4 * d + 2 * hidden);
    let attention = 4 * tokens * tokens * d;
    let patches = 2 * arch.grid().patches() * d * arch.patch_values();
    let vit = frozen_vit(&arch);
    let images = noise(&[batch, 3, 224, 224], 0);
    let mut group = c.benchmark_group("floating-point operations");
    group.throughput(Throughput::Elements(
        (batch * (maps + attention + patches)) as u64,
    ));
    group.bench_function(
        "one block of ViT-S with its patch embedding, batch 8",
        |b| {
            b.iter(|| vit.features(&images).expect("features"));
        },
    );
    let threads = rayon::current_num_threads() as u64;
    for (name, arch) in [
        ("ViT-Ti", Architecture::vit_tiny()),
        ("ViT-S", Architecture::vit_small()),
        ("ViT-B", Architecture::vit_base()),
    ] {
        // A piece is an image.
        let tokens = arch.grid().patches() + 1;
        let parts = Timed {
            width: arch.width,
            heads: arch.heads,
            hidden: arch.mlp_width,
            tokens,
            rows: tokens,
        };
        group.throughput(Throughput::Elements(threads * parts.operations()));
        for (kind, rounded) in [("f32", false), ("bf16", true)] {
            let mut work = parts.products(rounded);
            let name = format!("the four products of a block of {name} in {kind}");
            group.bench_function(name, |b| b.iter(&mut work));
        }
        group.throughput(Throughput::Elements(threads * parts.attention_operations()));
        let mut work = parts.attention();
        group.bench_function(format!("attention of {name}"), |b| b.iter(&mut work));
        // The student's step: half of the patches of 32 images.
        let step = Timed {
            tokens: StudentStep::kept(&arch) + 1,
            ..parts
        };
        group.throughput(Throughput::Elements(step.gradient_operations(32)));
        let mut work = step.weight_gradients(32);
        let name = format!("gradients of the weights of a block of {name}");
        group.bench_function(name, |b| b.iter(&mut work));
    }
    group.throughput(Throughput::Elements(threads * Peak::operations()));
    group.bench_function("peak of all threads", |b| {
        b.iter(|| rayon::broadcast(|_| pulp::Arch::new().dispatch(Peak)));
    });
    group.finish();
}

/// Independent multiply-adds in registers, enough of them to hide their latency.
struct Peak;

impl Peak {
    const ROUNDS: u64 = 1_000_000;
    const CHAINS: usize = 10;

    fn operations() -> u64 {
        struct Lanes;
        impl pulp::WithSimd for Lanes {
            type Output = u64;
            fn with_simd<S: pulp::Simd>(self, _: S) -> u64 {
                S::F32_LANES as u64
            }
        }
        2 * Self::ROUNDS * Self::CHAINS as u64 * pulp::Arch::new().dispatch(Lanes)
    }
}

impl pulp::WithSimd for Peak {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) -> f32 {
        let (factor, one) = (simd.splat_f32s(0.999), simd.splat_f32s(1.0));
        let mut sums = [one; Self::CHAINS];
        for _ in 0..Self::ROUNDS {
            for sum in &mut sums {
                *sum = simd.mul_add_f32s(*sum, factor, one);
            }
        }
        let total = sums.into_iter().fold(one, |a, b| simd.add_f32s(a, b));
        simd.reduce_sum_f32s(total)
    }
}

/// One update of all parameters of ViT-S, and candle's.
fn adamw(c: &mut Criterion) {
    let vit = random_vit(&Architecture::vit_small());
    let variables: Vec<Var> = vit.parameters().into_iter().map(|(_, var)| var).collect();
    let squares = variables.iter().map(|var| var.sqr()?.sum_all());
    let loss = squares
        .collect::<Result<Vec<_>, _>>()
        .and_then(|all| Tensor::stack(&all, 0)?.sum_all());
    let grads = loss.and_then(|loss| loss.backward()).expect("gradients");
    let mut group = c.benchmark_group("AdamW, ViT-S");
    let group_of_all = parameter_group(&vit);
    let mut ours = AdamW::new(vec![group_of_all], AdamWConfig::default()).expect("an optimiser");
    group.bench_function("defend-nn", |b| {
        b.iter(|| ours.step(&grads, 1.0).expect("a step"));
    });
    let parameters = candle_nn::ParamsAdamW {
        lr: 1e-6,
        ..candle_nn::ParamsAdamW::default()
    };
    let mut theirs = <candle_nn::AdamW as candle_nn::Optimizer>::new(variables, parameters)
        .expect("an optimiser");
    group.bench_function("candle-nn", |b| {
        b.iter(|| candle_nn::Optimizer::step(&mut theirs, &grads).expect("a step"));
    });
    group.finish();
}

criterion_group!(
    benches, sinkhorn, dense_loss, distance, images, products, adamw
);
criterion_main!(benches);
