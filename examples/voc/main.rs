//! The multi-object protocol on Pascal VOC: train on every image that shows a class, tell test images
//! that show it from those that do not (paper, section 4.4; METHOD.md, section 4).
//!
//! `cargo run --release --bin voc -- --voc VOCdevkit/VOC2012 --weights vit_tiny_patch16_224 dog cat`

#[path = "../scoring.rs"]
mod scoring;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Parser;
use defend_baselines::{MethodConfig, Teacher};
use defend_core::data::{
    ClassId, Difficult, Label, MultiObject, Protocol, ResizeMode, Subset, Voc,
};
use defend_core::distill::Aggregation;
use defend_core::prelude::*;
use defend_core::vit::{CacheConfig, ImageSource, TrainScope};
use defend_core::{MaskedConfig, ResizedImages};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// AUROC of the method, its variants and the references on Pascal VOC, as a Markdown table.
#[derive(Parser)]
struct Arguments {
    /// VOC folder with Annotations, ImageSets and JPEGImages.
    #[arg(long)]
    voc: PathBuf,
    /// Weight file or timm folder of the teacher.
    #[arg(long)]
    weights: PathBuf,
    /// JSON files with settings (`DefendConfig`, missing fields as by default); a row each, named after
    /// the file. Without one: the default settings, with and without the dense stage.
    #[arg(long)]
    config: Vec<PathBuf>,
    /// Seeds of the method; figures are means over them.
    #[arg(long, default_value = "0", value_delimiter = ',')]
    seeds: Vec<u64>,
    /// Uses only every n-th test image.
    #[arg(long, default_value_t = 1)]
    test_stride: usize,
    /// Leaves the references out.
    #[arg(long)]
    no_references: bool,
    /// Prints every aggregation of the patch distances, not only the configured one.
    #[arg(long)]
    all_scores: bool,
    /// Normal classes, one experiment each.
    #[arg(required = true)]
    classes: Vec<String>,
}

/// A line of the table: name, and AUROC of each class.
struct Row {
    name: String,
    values: Vec<f64>,
}

/// The test images of one normal class.
struct Test<'a> {
    images: &'a ResizedImages,
    abnormal: Vec<bool>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let open = |split| Voc::open(&arguments.voc, split, Difficult::Counted).map(Arc::new);
    let (train, test) = (open("train")?, open("val")?);
    let normal_classes = arguments
        .classes
        .iter()
        .map(|name| {
            train
                .class(name)
                .with_context(|| format!("VOC has no class \"{name}\""))
        })
        .collect::<Result<Vec<ClassId>>>()?;
    let vit = Pretrained::local(&arguments.weights).load(TrainScope::Frozen, &best_device())?;
    let teacher = Teacher::new(
        vit,
        1,
        ResizeMode::Squash,
        &best_device(),
        CacheConfig::default(),
    )?;
    let kept: Vec<usize> = (0..test.len())
        .step_by(arguments.test_stride.max(1))
        .collect();
    let test = Arc::new(Subset::new(test, kept)?);
    let mut bar = ProgressBar::new();
    let images = ResizedImages::read(
        test.clone(),
        teacher.preprocess().clone(),
        &best_device(),
        usize::MAX,
        true,
        &mut bar,
    )?;
    let variants = variants(&arguments)?;

    let mut rows: Vec<Row> = Vec::new();
    for (name, &class) in arguments.classes.iter().zip(&normal_classes) {
        let protocol = MultiObject {
            normal: vec![class],
        };
        let normal = Arc::new(Subset::new(train.clone(), protocol.train(&*train))?);
        let abnormal: Vec<bool> = (0..test.len())
            .map(|i| protocol.label(test.classes(i)) == Label::Abnormal)
            .collect();
        eprintln!(
            "{name}: {} training images, {} normal and {} abnormal test images",
            normal.len(),
            abnormal.iter().filter(|a| !**a).count(),
            abnormal.iter().filter(|a| **a).count()
        );
        let test = Test {
            images: &images,
            abnormal,
        };
        if !arguments.no_references {
            for (name, scores) in reference_scores(&teacher, &normal, &test, &mut bar)? {
                test.add(&mut rows, name, &scores)?;
            }
        }
        for (name, config) in &variants {
            for &seed in &arguments.seeds {
                let seed_name = if arguments.seeds.len() > 1 {
                    format!(", seed {seed}")
                } else {
                    String::new()
                };
                let config = DefendConfig {
                    seed,
                    ..config.clone()
                };
                let fitted = method_scores(&arguments, name, &config, &normal, &test, &mut bar)?;
                for (aggregation, scores) in fitted {
                    let detail = if arguments.all_scores {
                        format!(", {aggregation:?}")
                    } else {
                        String::new()
                    };
                    test.add(&mut rows, format!("{name}{detail}{seed_name}"), &scores)?;
                }
            }
        }
    }
    print_table(&arguments.classes, &rows);
    Ok(())
}

impl Test<'_> {
    /// Adds the AUROC of scores to the row of this name.
    fn add(&self, rows: &mut Vec<Row>, name: String, scores: &[f32]) -> Result<()> {
        let value = scoring::area(scores, &self.abnormal)?;
        eprintln!("  {name}: {value:.4}");
        match rows.iter_mut().find(|row| row.name == name) {
            Some(row) => row.values.push(value),
            None => rows.push(Row {
                name,
                values: vec![value],
            }),
        }
        Ok(())
    }
}

/// Names and scores of the references; the teacher's features of an image are computed once for all.
fn reference_scores(
    teacher: &Teacher,
    normal: &Arc<Subset>,
    test: &Test<'_>,
    bar: &mut ProgressBar,
) -> Result<Vec<(String, Vec<f32>)>> {
    let mut all = Vec::new();
    for reference in MethodConfig::references() {
        let method = reference.method();
        let detector = method.fit(teacher, normal.clone(), 0, bar)?;
        let mut scores = Vec::new();
        for batch in batches(test.images.len()) {
            let found = detector.score(&test.images.images(&batch)?)?;
            scores.extend(found.into_iter().map(|novelty| novelty.score as f32));
        }
        all.push((method.name(), scores));
    }
    Ok(all)
}

/// Fits once and scores with each aggregation.
fn method_scores(
    arguments: &Arguments,
    name: &str,
    config: &DefendConfig,
    normal: &Arc<Subset>,
    test: &Test<'_>,
    bar: &mut ProgressBar,
) -> Result<Vec<(Aggregation, Vec<f32>)>> {
    let start = Instant::now();
    let fitted = Defend::builder()
        .teacher(Pretrained::local(&arguments.weights))
        .device(best_device())
        .config(config.clone())
        .fit(normal.clone(), bar)?;
    let Some(distill) = fitted.distill() else {
        bail!("{name}: this table compares scores of a masked student");
    };
    let losses = &distill.losses;
    eprintln!(
        "  {name}, seed {}: fitted in {:.0} s, {} steps, dense loss {:.4?}, loss {:.4} -> {:.4}",
        config.seed,
        start.elapsed().as_secs_f64(),
        distill.steps,
        fitted.dense.as_ref().map(|d| &d.losses),
        losses.first().unwrap_or(&f64::NAN),
        losses.last().unwrap_or(&f64::NAN)
    );
    let Some(masked) = config.masked_student() else {
        bail!("{name}: this table compares scores of a masked student");
    };
    let aggregations = aggregations(masked, arguments.all_scores);
    let scores = scoring::scores(&fitted.detector, test.images, &aggregations)?;
    Ok(aggregations.into_iter().zip(scores).collect())
}

/// Names and settings of the rows.
fn variants(arguments: &Arguments) -> Result<Vec<(String, DefendConfig)>> {
    if arguments.config.is_empty() {
        let whole = DefendConfig::masked();
        let distillation = DefendConfig {
            dense: None,
            ..whole.clone()
        };
        return Ok(vec![
            ("whole method".into(), whole),
            ("masked distillation alone".into(), distillation),
        ]);
    }
    let read = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let config: DefendConfig =
            serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        let Some(name) = path.file_stem() else {
            bail!("{} has no name", path.display())
        };
        Ok((name.to_string_lossy().into_owned(), config))
    };
    arguments.config.iter().map(read).collect()
}

fn aggregations(config: &MaskedConfig, all: bool) -> Vec<Aggregation> {
    if !all {
        return vec![config.aggregation];
    }
    let mut list = vec![
        Aggregation::Mean,
        Aggregation::AttentionWeighted,
        Aggregation::BestPatches { share: 0.1 },
        Aggregation::BestPatches { share: 0.5 },
        Aggregation::WorstPatches { share: 0.1 },
    ];
    if config.distill.cls_weight > 0.0 {
        list.push(Aggregation::Cls);
        list.push(Aggregation::PatchesAndCls { weight: 1.0 });
    }
    list
}

fn batches(images: usize) -> Vec<Vec<usize>> {
    let all: Vec<usize> = (0..images).collect();
    all.chunks(32).map(<[usize]>::to_vec).collect()
}

fn print_table(classes: &[String], rows: &[Row]) {
    println!("| AUROC | {} | mean |", classes.join(" | "));
    println!("|---|{}---|", "---|".repeat(classes.len()));
    for row in rows {
        let cells: Vec<String> = row.values.iter().map(|v| format!("{v:.3}")).collect();
        let mean = row.values.iter().sum::<f64>() / row.values.len().max(1) as f64;
        println!("| {} | {} | {mean:.3} |", row.name, cells.join(" | "));
    }
}
