//! Side by side with PyTorch, onnxruntime, Pillow and torchvision, alternating in one run:
//!
//! `cargo bench -p defend-benches --bench versus -- --python venv/bin/python --photos JPEGImages [--rounds 5] [--only ROW]`
//!
//! `venv` holds `benches/versus/requirements.txt`. Every row does the same work with the same weights and inputs on both
//! sides, checks that the results agree, and prints medians and the median of the paired ratios.
#![allow(
    missing_docs,
    clippy::expect_used,
    clippy::panic,
    reason = "a benchmark, not an interface"
)]

mod candle;
mod rows;
mod theirs;
mod whole;

use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;

use rows::Row;
use theirs::Theirs;
use whole::Files;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Times this workspace and its references in turn.
#[derive(Parser)]
struct Arguments {
    /// Python with the packages of requirements.txt.
    #[arg(long)]
    python: PathBuf,
    /// Folder of JPEG photos for decoding and resizing; that row is left out without it.
    #[arg(long)]
    photos: Option<PathBuf>,
    /// VOC folder with Annotations, ImageSets and JPEGImages, for whole fits and scores; with `--weights`.
    #[arg(long, requires = "weights")]
    voc: Option<PathBuf>,
    /// timm folder of ViT-Ti, for whole fits and scores.
    #[arg(long, requires = "voc")]
    weights: Option<PathBuf>,
    /// A library to preload into one more PyTorch, whose MKL takes the processor for one of Intel's:
    /// `echo 'int mkl_serv_intel_cpu_true(void){return 1;}' | cc -shared -fPIC -x c - -o unlock.so`.
    #[arg(long)]
    unlock: Option<PathBuf>,
    /// Rounds of A, B, A, B.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Threads of both sides.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Rows whose names contain this.
    #[arg(long, default_value = "")]
    only: String,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let arguments = Arguments::parse();
    rayon::ThreadPoolBuilder::new()
        .num_threads(arguments.threads)
        .build_global()
        .expect("a thread pool");
    println!("| | ours | theirs | engine | theirs / ours |\n|---|---|---|---|---|");
    let mut rows = rows::all(arguments.photos.as_deref());
    if let (Some(voc), Some(weights)) = (arguments.voc.clone(), arguments.weights.clone()) {
        rows.extend(whole::rows(&Files { voc, weights }));
    }
    for row in rows {
        if row.name.contains(&arguments.only) {
            compare(row, &arguments);
        }
    }
}

/// Median; `values` is not empty.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn compare(row: Row, arguments: &Arguments) {
    let Row {
        name,
        engines,
        items,
        warm_up,
        tolerance,
        prepare,
    } = row;
    let folder = tempfile::tempdir().expect("a folder");
    let (request, mut work) = prepare(folder.path());
    let ours_check = (work.check)();
    let start = |engine, preload: Option<&PathBuf>| {
        let Arguments {
            python, threads, ..
        } = arguments;
        Theirs::start(python, *threads, &request, engine, preload)
    };
    let mut theirs: Vec<Theirs> = engines.iter().map(|engine| start(engine, None)).collect();
    if engines.contains(&"torch")
        && let Some(library) = &arguments.unlock
    {
        theirs.push(start("torch", Some(library)));
    }
    theirs.extend(
        work.here
            .take()
            .map(|(name, work)| Theirs::here(name, *work)),
    );
    for other in &theirs {
        assert_eq!(ours_check.len(), other.check.len(), "{name}");
        let size = other
            .check
            .iter()
            .fold(0.0, |size: f64, b| size.max(b.abs()));
        for (a, b) in ours_check.iter().zip(&other.check) {
            assert!(
                (a - b).abs() <= tolerance * size,
                "{name}: {a} here, {b} in {}",
                other.engine
            );
        }
    }
    let mut times = 1;
    if warm_up {
        (work.run)();
        let start = Instant::now();
        (work.run)();
        // A measurement lasts about half a second.
        times = (0.5 / start.elapsed().as_secs_f64())
            .ceil()
            .clamp(1.0, 1000.0) as usize;
        for other in &mut theirs {
            other.run(1);
        }
    }
    let mut ours = Vec::new();
    let mut others = vec![Vec::new(); theirs.len()];
    for _ in 0..arguments.rounds {
        let start = Instant::now();
        for _ in 0..times {
            (work.run)();
        }
        ours.push(start.elapsed().as_secs_f64() / times as f64);
        for (other, seconds) in theirs.iter_mut().zip(&mut others) {
            seconds.push(other.run(times) / times as f64);
        }
    }
    for (other, seconds) in theirs.iter().zip(others) {
        let ratios = seconds
            .iter()
            .zip(&ours)
            .map(|(theirs, ours)| theirs / ours);
        let ratio = median(ratios.collect());
        let shown = |seconds: f64| match items {
            0 if seconds > 1.0 => format!("{seconds:.1} s"),
            0 => format!("{:.2} ms", seconds * 1e3),
            items => format!("{:.1} img/s", items as f64 / seconds),
        };
        println!(
            "| {name} | {} | {} | {} | {ratio:.2} |",
            shown(median(ours.clone())),
            shown(median(seconds)),
            other.engine,
        );
    }
}
