//! The paper's ablations (Tables 1 and 3): a list of settings on one data set, each over classes and seeds.
//!
//! `cargo run --release --bin ablate -- --weights vit_tiny_patch16_224 --fashion-mnist DIR --seeds 0,1,2 T-shirt Bag`

#[path = "../scoring.rs"]
mod scoring;
mod sets;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use defend_core::data::{Label, MultiObject, Protocol, ResizeMode, Subset};
use defend_core::distill::Aggregation;
use defend_core::prelude::*;
use defend_core::vit::{Encoder, TrainScope};
use defend_core::{ResizedImages, preprocess_of};
use serde::Deserialize;

use sets::{Set, class_id, spread};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// AUROC of a list of settings with a confidence interval over seeds, as a Markdown table.
#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    set: Set,
    /// Weight file or model folder of the teacher.
    #[arg(long)]
    weights: PathBuf,
    /// JSON list of `{"table", "name", "settings"}`, settings as `DefendConfig` with missing fields by default.
    /// Without it: Tables 1 and 3 of the paper.
    #[arg(long)]
    rows: Option<PathBuf>,
    /// Seeds; the interval is over their means of the classes.
    #[arg(long, default_value = "0,1,2", value_delimiter = ',')]
    seeds: Vec<u64>,
    /// Normal training images a class, evenly spread over the class.
    #[arg(long, default_value_t = 128)]
    train: usize,
    /// Test images a class, half of them normal, evenly spread.
    #[arg(long, default_value_t = 400)]
    test: usize,
    /// Distillation epochs of every row that does not name its own.
    #[arg(long, default_value_t = 10)]
    epochs: usize,
    /// Batch of the distillation, likewise.
    #[arg(long, default_value_t = 16)]
    batch_size: usize,
    /// Normal classes, one experiment each.
    #[arg(required = true)]
    classes: Vec<String>,
}

/// A line of the table.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    /// Table of the paper that it belongs to.
    table: String,
    /// What is different.
    name: String,
    /// Settings; missing ones as by default.
    settings: serde_json::Value,
}

/// One class as the normal one.
struct Experiment {
    normal: Arc<Subset>,
    test: ResizedImages,
    abnormal: Vec<bool>,
}

const SCORES: [(&str, Aggregation); 3] = [
    ("patches", Aggregation::Mean),
    ("CLS", Aggregation::Cls),
    ("patches + CLS", Aggregation::PatchesAndCls { weight: 1.0 }),
];

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let rows = match &arguments.rows {
        Some(path) => std::fs::read_to_string(path).with_context(|| path.display().to_string())?,
        None => include_str!("paper.json").to_owned(),
    };
    let rows: Vec<Row> = serde_json::from_str(&rows).context("list of rows")?;
    let configs = rows
        .iter()
        .map(|row| settings(row, &arguments).with_context(|| format!("row \"{}\"", row.name)))
        .collect::<Result<Vec<_>>>()?;
    let experiments = experiments(&arguments)?;

    println!("| table | setting | {} |", SCORES.map(|s| s.0).join(" | "));
    println!("|---|---{}|", "|---".repeat(SCORES.len()));
    for (row, config) in rows.iter().zip(configs) {
        let start = Instant::now();
        let mut by_seed = Vec::new();
        for &seed in &arguments.seeds {
            let config = DefendConfig {
                seed,
                ..config.clone()
            };
            let mut sums = [0.0; SCORES.len()];
            for experiment in &experiments {
                let found = experiment.run(&arguments, &config)?;
                for (sum, found) in sums.iter_mut().zip(found) {
                    *sum += found / experiments.len() as f64;
                }
            }
            by_seed.push(sums);
        }
        let cells: Vec<String> = (0..SCORES.len())
            .map(|i| cell(&by_seed.iter().map(|sums| sums[i]).collect::<Vec<f64>>()))
            .collect();
        println!("| {} | {} | {} |", row.table, row.name, cells.join(" | "));
        eprintln!("{}: {:.0} s", row.name, start.elapsed().as_secs_f64());
    }
    Ok(())
}

/// The settings of a row over the lengths given on the command line.
fn settings(row: &Row, arguments: &Arguments) -> Result<DefendConfig> {
    let mut value = row.settings.clone();
    let fields = value.as_object_mut().context("settings are an object")?;
    let mut object = fields;
    for stage in ["student", "masked", "distill"] {
        let inner = object.entry(stage).or_insert_with(|| serde_json::json!({}));
        object = inner
            .as_object_mut()
            .with_context(|| format!("{stage} is an object"))?;
    }
    let distill = object;
    distill.entry("epochs").or_insert(arguments.epochs.into());
    distill
        .entry("batch_size")
        .or_insert(arguments.batch_size.into());
    let config: DefendConfig = serde_json::from_value(value)?;
    config.validate()?;
    let masked = config.masked_student();
    ensure!(
        masked.is_some_and(|masked| masked.distill.cls_weight > 0.0),
        "distill.cls_weight is 0, but the table scores the CLS token too"
    );
    Ok(config)
}

fn experiments(arguments: &Arguments) -> Result<Vec<Experiment>> {
    let (train, test) = arguments.set.open()?;
    let teacher = Pretrained::local(&arguments.weights).load(TrainScope::Frozen, &best_device())?;
    let preprocess = preprocess_of(teacher.spec(), ResizeMode::Squash);
    arguments
        .classes
        .iter()
        .map(|name| {
            let protocol = MultiObject {
                normal: vec![class_id(&*train, name)?],
            };
            let normal = spread(&protocol.train(&*train), arguments.train);
            let (novel, known): (Vec<usize>, Vec<usize>) =
                (0..test.len()).partition(|&i| protocol.label(test.classes(i)) == Label::Abnormal);
            let (known, novel) = (
                spread(&known, arguments.test / 2),
                spread(&novel, arguments.test - arguments.test / 2),
            );
            ensure!(
                !known.is_empty() && !novel.is_empty(),
                "the test images of {name} are all normal or all abnormal"
            );
            eprintln!(
                "{name}: {} training images, {} normal and {} abnormal test images",
                normal.len(),
                known.len(),
                novel.len()
            );
            let abnormal = [vec![false; known.len()], vec![true; novel.len()]].concat();
            let test = Arc::new(Subset::new(test.clone(), [known, novel].concat())?);
            Ok(Experiment {
                normal: Arc::new(Subset::new(train.clone(), normal)?),
                test: ResizedImages::read(
                    test,
                    preprocess.clone(),
                    &best_device(),
                    usize::MAX,
                    true,
                    &mut ProgressBar::hidden(),
                )?,
                abnormal,
            })
        })
        .collect()
}

impl Experiment {
    /// Fits once; the AUROC of each of [`SCORES`].
    fn run(&self, arguments: &Arguments, config: &DefendConfig) -> Result<[f64; SCORES.len()]> {
        let fitted = Defend::builder()
            .teacher(Pretrained::local(&arguments.weights))
            .device(best_device())
            .config(config.clone())
            .fit(self.normal.clone(), &mut ProgressBar::hidden())?;
        let scores = scoring::scores(&fitted.detector, &self.test, &SCORES.map(|s| s.1))?;
        let mut values = [0.0; SCORES.len()];
        for (value, scores) in values.iter_mut().zip(&scores) {
            *value = scoring::area(scores, &self.abnormal)?;
        }
        Ok(values)
    }
}

/// Mean, and with several seeds the half width of Student's 95 % interval of the mean.
fn cell(values: &[f64]) -> String {
    /// 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom.
    const T: [f64; 9] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262,
    ];
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    if values.len() < 2 {
        return format!("{mean:.3}");
    }
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let t = T.get(values.len() - 2).copied().unwrap_or(1.96);
    format!("{mean:.3} ± {:.3}", t * (variance / n).sqrt())
}
