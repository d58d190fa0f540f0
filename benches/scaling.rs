//! How the cost of each stage grows: with the batch, the tokens, the depth, the prototypes and the images.
//!
//! `cargo bench -p defend-benches --bench scaling -- [--out docs/scaling.svg]`
//!
//! Prints a table and draws it, each panel as time (or memory) for one unit of what grows, so that a line that is flat
//! means a cost in proportion.
#![allow(
    missing_docs,
    clippy::expect_used,
    reason = "a benchmark, not an interface"
)]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{Device, Tensor};
use clap::Parser;
use defend_benches::{frozen_vit, noise};
use defend_distill::{DistillConfig, DistillRoles, Distiller, FeatureDistance};
use defend_nn::{Rng, normal};
use defend_ot::{Assigner, SinkhornKnopp};
use defend_train::Training;
use defend_vit::{Architecture, Backbone, BackboneSpec, Error, ImageSource, Vit};
use plotters::prelude::*;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measures and draws.
#[derive(Parser)]
struct Arguments {
    /// The drawing.
    #[arg(long, default_value = "target/scaling.svg")]
    out: PathBuf,
    /// Repetitions, of which the median counts.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// One quantity against another.
struct Panel {
    title: &'static str,
    grows: &'static str,
    unit: &'static str,
    points: Vec<(f64, f64)>,
}

fn main() {
    let arguments = Arguments::parse();
    let rounds = arguments.rounds;
    let mut panels = vec![
        by_batch(rounds),
        by_tokens(rounds),
        by_depth(rounds),
        by_prototypes(rounds),
    ];
    panels.extend(by_images());
    for panel in &panels {
        println!(
            "\n{}\n\n| {} | {} |\n|---|---|",
            panel.title, panel.grows, panel.unit
        );
        for (x, y) in &panel.points {
            println!("| {x} | {y:.3} |");
        }
    }
    draw(&arguments.out, &panels).expect("a drawing");
}

/// Median milliseconds of one call, after a first one that is not counted.
fn milliseconds(rounds: usize, mut work: impl FnMut()) -> f64 {
    work();
    let mut times: Vec<f64> = (0..rounds)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Milliseconds of a forward pass.
fn forward(vit: &Vit, batch_size: usize, side: usize, rounds: usize) -> f64 {
    let images = noise(&[batch_size, 3, side, side], 1);
    milliseconds(rounds, || {
        vit.features(&images).expect("features");
    })
}

fn by_batch(rounds: usize) -> Panel {
    let vit = frozen_vit(&Architecture::vit_tiny());
    let point = |batch| {
        (
            batch as f64,
            forward(&vit, batch, 224, rounds) / batch as f64,
        )
    };
    Panel {
        title: "Forward pass, ViT-Ti, 224 px",
        grows: "images a batch",
        unit: "ms an image",
        points: [1, 2, 4, 8, 16, 32, 64].map(point).to_vec(),
    }
}

fn by_tokens(rounds: usize) -> Panel {
    let vit = frozen_vit(&Architecture::vit_tiny());
    let point = |side: usize| {
        let tokens = (side / 16).pow(2) + 1;
        (
            tokens as f64,
            forward(&vit, 4, side, rounds) / (4 * tokens) as f64 * 1e3,
        )
    };
    Panel {
        title: "Forward pass, ViT-Ti, batch 4, 64 to 512 px",
        grows: "tokens an image",
        unit: "µs a token",
        points: [64, 96, 128, 192, 224, 288, 384, 512].map(point).to_vec(),
    }
}

fn by_depth(rounds: usize) -> Panel {
    let point = |depth: usize| {
        let vit = frozen_vit(&Architecture {
            depth,
            ..Architecture::vit_tiny()
        });
        (
            depth as f64,
            forward(&vit, 8, 224, rounds) / (8 * depth) as f64,
        )
    };
    Panel {
        title: "Forward pass, width 192, batch 8",
        grows: "blocks",
        unit: "ms an image and block",
        points: [1, 2, 4, 8, 12, 24].map(point).to_vec(),
    }
}

fn by_prototypes(rounds: usize) -> Panel {
    let point = |k: usize| {
        let scores = noise(&[6272, k], 1).tanh().expect("scores");
        let time = milliseconds(rounds, || {
            SinkhornKnopp::default().assign(&scores).expect("Q");
        });
        (k as f64, time / k as f64 * 1e3)
    };
    Panel {
        title: "Sinkhorn-Knopp, 6272 patches",
        grows: "prototypes, K",
        unit: "µs a prototype",
        points: [5, 10, 20, 50, 100, 300, 1000].map(point).to_vec(),
    }
}

/// Images that are made when they are asked for, so that the memory is the distillation's own.
struct Made(usize);

impl ImageSource for Made {
    fn len(&self) -> usize {
        self.0
    }

    fn images(&self, indices: &[usize]) -> Result<Tensor, Error> {
        let made = indices.iter().map(|&i| {
            let rng = &mut Rng::stream(7, i as u64);
            normal((3, 224, 224), 1.0, rng, &Device::Cpu)
        });
        Ok(Tensor::stack(
            &made.collect::<candle_core::Result<Vec<_>>>()?,
            0,
        )?)
    }
}

/// Two epochs of distillation: the time of an image, and the peak memory with the teacher's features kept and without.
fn by_images() -> Vec<Panel> {
    let spec = BackboneSpec::new(Architecture::vit_tiny());
    let teacher = frozen_vit(&Architecture::vit_tiny());
    let mut times = Vec::new();
    let mut memory = [Vec::new(), Vec::new()];
    for count in [32, 64, 128, 256] {
        for (kept, memory) in [true, false].into_iter().zip(&mut memory) {
            let config = DistillConfig {
                epochs: 2,
                batch_size: 16,
                cache_bytes: if kept { 2 << 30 } else { 0 },
                ..DistillConfig::default()
            };
            let (mask, mut rng) = (config.mask, Rng::seed(0));
            let student =
                Vit::random(spec.clone(), 0.1, &mut rng, &Device::Cpu).expect("a student");
            // "5" sets the peak back to what is in use now.
            let _ = std::fs::write("/proc/self/clear_refs", "5");
            let start = Instant::now();
            Distiller::new(config)
                .and_then(|distiller| {
                    let objective = FeatureDistance::default();
                    let images = Made(count);
                    let roles = DistillRoles {
                        teacher: &teacher,
                        student: &student,
                        mask: &mask,
                        objective: &objective,
                    };
                    distiller.distill(
                        roles,
                        &images,
                        Training::new(&mut rng, &mut |_| ControlFlow::Continue(())),
                    )
                })
                .expect("a student");
            if kept {
                let each = start.elapsed().as_secs_f64() * 1e3 / (2 * count) as f64;
                times.push((count as f64, each));
            }
            memory.extend(peak_mebibytes().map(|peak| (count as f64, peak)));
        }
    }
    let [kept, recomputed] = memory;
    let panel = |title, unit, points| Panel {
        title,
        grows: "training images",
        unit,
        points,
    };
    vec![
        panel(
            "Two epochs of masked distillation, ViT-Ti",
            "ms an image and epoch",
            times,
        ),
        panel("Peak memory, the teacher's features kept", "MiB", kept),
        panel(
            "Peak memory, the teacher's features computed anew",
            "MiB",
            recomputed,
        ),
    ]
}

/// Largest resident memory since it was set back; Linux only.
fn peak_mebibytes() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM"))?;
    let kibibytes: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kibibytes / 1024.0)
}

fn draw(path: &Path, panels: &[Panel]) -> Result<(), Box<dyn std::error::Error>> {
    const COLUMNS: usize = 2;
    let rows = panels.len().div_ceil(COLUMNS);
    let root = SVGBackend::new(path, (960, 280 * rows as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, panel) in root.split_evenly((rows, COLUMNS)).iter().zip(panels) {
        let xs = panel.points.iter().map(|point| point.0);
        let (low, high) = (
            xs.clone().fold(f64::INFINITY, f64::min),
            xs.fold(0.0, f64::max),
        );
        let top = panel.points.iter().map(|point| point.1).fold(0.0, f64::max);
        let mut chart = ChartBuilder::on(area)
            .caption(panel.title, ("sans-serif", 16))
            .margin(10)
            .x_label_area_size(36)
            .y_label_area_size(56)
            .build_cartesian_2d((low..high).log_scale(), 0.0..top * 1.1)?;
        chart
            .configure_mesh()
            .x_desc(panel.grows)
            .y_desc(panel.unit)
            .draw()?;
        let line = LineSeries::new(panel.points.iter().copied(), BLUE.stroke_width(2));
        chart.draw_series(line)?;
        let marks = panel
            .points
            .iter()
            .map(|&point| Circle::new(point, 3, BLUE.filled()));
        chart.draw_series(marks)?;
    }
    root.present()?;
    Ok(())
}
