//! Images per second on a graphics card, and the card's peak: the Rust half of `tools/gpu.sh`.
//!
//! `cargo bench -p defend-benches --features cuda --bench gpu -- [--smoke] [--seconds 2] [--only "ViT-S, batch 32, bf16"]`
//!
//! Prints one JSON object a line: `{"work", "precision", "images", "seconds", "flop"}`, where `seconds` and `flop` are
//! of one repetition. `--smoke` runs tiny settings, on any device.
#![allow(
    missing_docs,
    clippy::expect_used,
    reason = "a benchmark, not an interface"
)]

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use clap::Parser;
use defend_benches::{StudentStep, random_vit};
use defend_nn::{Rng, normal};
use defend_vit::{Architecture, Backbone, TrainScope, Vit};
use serde_json::json;

/// Times forward passes, student steps and a large product on the best device.
#[derive(Parser)]
struct Arguments {
    /// Tiny settings that run anywhere.
    #[arg(long)]
    smoke: bool,
    /// Length of a measurement; each is the median of three.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Rows whose work and precision contain this.
    #[arg(long, default_value = "")]
    only: String,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A backbone of random weights on the processor.
struct Model {
    name: &'static str,
    architecture: Architecture,
    vit: Vit,
}

impl Model {
    fn new(name: &'static str, architecture: Architecture) -> Self {
        let vit = random_vit(&architecture);
        Self {
            name,
            architecture,
            vit,
        }
    }
}

struct Settings {
    models: Vec<Model>,
    batches: Vec<usize>,
    /// Side of the matrices whose product gives the peak.
    side: usize,
}

impl Settings {
    fn new(smoke: bool) -> Self {
        if !smoke {
            return Self {
                models: vec![
                    Model::new("ViT-S", Architecture::vit_small()),
                    Model::new("ViT-B", Architecture::vit_base()),
                ],
                batches: vec![32, 128],
                side: 8192,
            };
        }
        let smallest = Architecture {
            image_size: 32,
            patch_size: 8,
            width: 64,
            depth: 2,
            heads: 2,
            mlp_width: 256,
            ..Architecture::vit_tiny()
        };
        Self {
            models: vec![Model::new("smallest", smallest)],
            batches: vec![2, 4],
            side: 256,
        }
    }
}

/// What a product of matrices is computed in.
#[derive(Clone, Copy, PartialEq)]
enum Precision {
    F32,
    /// `f32` tensors, products with 10 bits of mantissa.
    Tf32,
    Bf16,
}

impl Precision {
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Tf32 => "TF32",
            Self::Bf16 => "bf16",
        }
    }

    fn dtype(self) -> DType {
        match self {
            Self::F32 | Self::Tf32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }

    /// candle multiplies no `bf16` matrices on the CPU, and TF32 is NVIDIA's.
    fn runs_on(self, device: &Device) -> bool {
        match self {
            Self::F32 => true,
            Self::Tf32 => device.is_cuda(),
            Self::Bf16 => !device.is_cpu(),
        }
    }
}

/// Where and how exactly the work is done.
struct Place {
    device: Device,
    /// Seconds of a measurement.
    length: f64,
    precision: Precision,
    only: String,
}

/// Multiplications and additions of the blocks, and of the patch embedding, for an image of `patches` patches.
fn flop(architecture: &Architecture, patches: usize) -> [f64; 2] {
    let (t, d) = ((patches + 1) as f64, architecture.width as f64);
    let products = 2.0 * t * d * (4.0 * d + 2.0 * architecture.mlp_width as f64);
    let attention = 4.0 * t * t * d;
    let values = (3 * architecture.patch_size * architecture.patch_size) as f64;
    [
        architecture.depth as f64 * (products + attention),
        2.0 * patches as f64 * values * d,
    ]
}

impl Place {
    fn noise(&self, shape: &[usize], seed: u64) -> Tensor {
        let noise = normal(shape, 1.0, &mut Rng::seed(seed), &self.device).expect("a tensor");
        noise.to_dtype(self.precision.dtype()).expect("a tensor")
    }

    fn images(&self, architecture: &Architecture, batch: usize) -> Tensor {
        let side = architecture.image_size;
        self.noise(&[batch, 3, side, side], 1)
    }

    fn vit(&self, model: &Model, scope: TrainScope) -> Vit {
        let dtype = self.precision.dtype();
        let there = model.vit.copy_to(TrainScope::Frozen, &self.device);
        there
            .and_then(|vit| vit.to_dtype(dtype)?.copy(scope))
            .expect("a backbone")
    }

    /// Reports the median of three measurements of `work`, whose repetition takes `flop` operations on `images` images.
    fn measure(&self, name: &str, images: usize, flop: f64, mut work: impl FnMut()) {
        if !format!("{name}, {}", self.precision.name()).contains(&self.only) {
            return;
        }
        let mut timed = |times: usize| {
            self.device.synchronize().expect("the device answers");
            let start = Instant::now();
            for _ in 0..times {
                work();
            }
            self.device.synchronize().expect("the device answers");
            start.elapsed().as_secs_f64() / times as f64
        };
        timed(3);
        let times = (self.length / timed(3)).ceil().clamp(1.0, 10_000.0) as usize;
        let mut each = [timed(times), timed(times), timed(times)];
        each.sort_by(f64::total_cmp);
        let (precision, seconds) = (self.precision.name(), each[1]);
        let line = json!({
            "work": name, "precision": precision, "images": images, "seconds": seconds, "flop": flop,
        });
        println!("{line}");
    }

    fn peak(&self, side: usize) {
        let (a, b) = (self.noise(&[side, side], 1), self.noise(&[side, side], 2));
        self.measure("peak", 0, 2.0 * (side as f64).powi(3), || {
            a.matmul(&b).expect("a product");
        });
    }

    fn forward(&self, model: &Model, batch: usize) {
        let (name, arch) = (model.name, &model.architecture);
        let vit = self.vit(model, TrainScope::Frozen);
        let images = self.images(arch, batch);
        let [blocks, embedding] = flop(arch, arch.grid().patches());
        let work = format!("forward, {name}, batch {batch}");
        self.measure(&work, batch, batch as f64 * (blocks + embedding), || {
            vit.features(&images).expect("features");
        });
    }

    fn student_step(&self, model: &Model, batch: usize) {
        let (name, arch) = (model.name, &model.architecture);
        let student = self.vit(model, TrainScope::All).with_fixed_positions();
        let kept = StudentStep::kept(arch);
        let target = self.noise(&[batch, kept, arch.width], 2);
        let mut step = StudentStep::new(student, arch, self.images(arch, batch), target);
        // Backwards twice the products, but none to the pixels.
        let [blocks, embedding] = flop(arch, kept);
        let work = format!("student step, {name}, {} tokens, batch {batch}", kept + 1);
        let flop = batch as f64 * (3.0 * blocks + 2.0 * embedding);
        self.measure(&work, batch, flop, || step.run());
    }
}

fn main() {
    let arguments = Arguments::parse();
    let gpu = Device::new_cuda(0).or_else(|_| Device::new_metal(0));
    let device = gpu.unwrap_or(Device::Cpu);
    let settings = Settings::new(arguments.smoke);
    eprintln!("this workspace on {:?}", device.location());
    for precision in [Precision::F32, Precision::Tf32, Precision::Bf16] {
        if !precision.runs_on(&device) {
            eprintln!("{} is left out on this device", precision.name());
            continue;
        }
        candle_core::cuda::set_gemm_reduced_precision_f32(precision == Precision::Tf32);
        let place = Place {
            device: device.clone(),
            length: arguments.seconds,
            precision,
            only: arguments.only.clone(),
        };
        place.peak(settings.side);
        for model in &settings.models {
            for &batch in &settings.batches {
                place.forward(model, batch);
                place.student_step(model, batch);
            }
        }
    }
}
