//! How the embedded backbone was made: masked distillation of a pretrained Vision Transformer into one
//! with fewer blocks, on any photos.
//!
//! The student starts from evenly spaced blocks of the teacher, learns with half of the patches hidden,
//! then for a last stretch with all of them, as it will be used.
//!
//! `cargo run --release --bin train_backbone -- --weights vit_tiny_patch16_224 --out weights.safetensors PHOTOS...`

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Result, ensure};
use clap::Parser;
use defend_core::data::{Fit, Subset};
use defend_core::distill::{
    DistillConfig, DistillObjective, Distiller, FeatureDistance, Mask, discrepancy,
};
use defend_core::nn::{Rng, Schedule, TrainingStep};
use defend_core::prelude::*;
use defend_core::vit::{Encoder, ImageSource, TrainScope, Trainable, Vit};
use defend_core::{Event, Observer, Pictures, Stage, preprocess_of};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Distils a pretrained backbone into one with fewer blocks.
#[derive(Parser)]
struct Arguments {
    /// Weight file or timm folder of the teacher.
    #[arg(long)]
    weights: PathBuf,
    /// File to write, f16 safetensors.
    #[arg(long)]
    out: PathBuf,
    /// Name that the weights carry.
    #[arg(long, default_value = "defend_tiny_patch16_224")]
    name: String,
    /// Blocks of the teacher that the student starts from.
    #[arg(long, value_delimiter = ',', default_value = "0,3,7,11")]
    blocks: Vec<usize>,
    /// Epochs with half of the patches hidden.
    #[arg(long, default_value_t = 8)]
    masked_epochs: usize,
    /// Epochs with all patches.
    #[arg(long, default_value_t = 2)]
    whole_epochs: usize,
    /// Images a step.
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Peak learning rate of the masked epochs; a third of it for the others.
    #[arg(long, default_value_t = 1e-3)]
    learning_rate: f64,
    /// Seed of every random choice.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Every n-th photo is held out to measure the result.
    #[arg(long, default_value_t = 50)]
    held_out: usize,
    /// Folders of photos.
    #[arg(required = true)]
    photos: Vec<PathBuf>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let teacher = Pretrained::local(&arguments.weights).load(TrainScope::Frozen, &best_device())?;
    let mut bar = ProgressBar::new();

    let mut paths = Vec::new();
    for folder in &arguments.photos {
        paths.extend(ImageFolder::open(folder)?.paths().to_vec());
    }
    let (held_out, used): (Vec<usize>, Vec<usize>) =
        (0..paths.len()).partition(|i| i % arguments.held_out.max(2) == 0);
    ensure!(!used.is_empty(), "no photos left to train on");
    let photos: Arc<dyn Dataset> = Arc::new(ImageFolder::from_paths(paths));
    let mut read = |indices| -> Result<Pictures> {
        let subset = Arc::new(Subset::new(photos.clone(), indices)?);
        let preprocess = preprocess_of(teacher.spec(), Fit::Squash);
        Ok(Pictures::read(
            subset,
            preprocess,
            &best_device(),
            usize::MAX,
            false,
            &mut bar,
        )?)
    };
    let (held_out, used) = (read(held_out)?, read(used)?);

    let student = teacher.with_blocks(&arguments.blocks, &arguments.name)?;
    let parameters: usize = student
        .parameters()
        .iter()
        .map(|(_, v)| v.elem_count())
        .sum();
    eprintln!(
        "{} photos, {} held out, {parameters} parameters",
        used.len(),
        held_out.len()
    );
    report("before", &teacher, &student, &held_out)?;
    let phases = [
        (
            "masked",
            arguments.masked_epochs,
            Mask::Random { ratio: 0.5 },
            1.0,
        ),
        ("whole", arguments.whole_epochs, Mask::None, 1.0 / 3.0),
    ];
    for (phase, epochs, mask, share) in phases {
        if epochs == 0 {
            continue;
        }
        let config = DistillConfig {
            epochs,
            batch: arguments.batch,
            mask,
            cls_weight: 1.0,
            learning_rate: arguments.learning_rate * share,
            schedule: Schedule::Cosine {
                warmup: 0.02,
                floor: 0.01,
            },
            drop_path: 0.0,
            cache_bytes: 8 << 30,
            ..DistillConfig::default()
        };
        bar.on(&Event::Started {
            stage: Stage::Distill,
            images: (epochs * used.len()) as u64,
        });
        let mut on_step = |step: TrainingStep| {
            let (images, loss) = (step.images as u64, Some(step.loss));
            bar.on(&Event::Advanced { images, loss });
        };
        let (distance, mut rng) = (FeatureDistance::default(), Rng::stream(arguments.seed, 1));
        let distilled = Distiller::new(config)?.distill(
            &teacher,
            &student,
            &mask,
            &distance,
            &used,
            &mut rng,
            &mut on_step,
        )?;
        bar.on(&Event::Finished {
            stage: Stage::Distill,
        });
        eprintln!("{phase}: losses {:.4?}", distilled.losses);
        report(phase, &teacher, &student, &held_out)?;
        std::fs::write(
            &arguments.out,
            student.to_safetensors(defend_core::DType::F16)?,
        )?;
    }
    Ok(())
}

/// Mean squared distance of unit features on photos that were not trained on.
fn report(name: &str, teacher: &Vit, student: &Vit, photos: &Pictures) -> Result<()> {
    let distance: &dyn DistillObjective = &FeatureDistance::default();
    let indices: Vec<usize> = (0..photos.len()).collect();
    let (mut patches, mut cls) = (0.0, 0.0);
    for batch in indices.chunks(32) {
        let found = discrepancy(teacher, student, distance, 1, &photos.images(batch)?)?;
        patches += f64::from(found.patches.mean_all()?.to_scalar::<f32>()?) * batch.len() as f64;
        cls += f64::from(found.cls.mean_all()?.to_scalar::<f32>()?) * batch.len() as f64;
    }
    let n = photos.len() as f64;
    eprintln!(
        "{name}: held-out distance of patches {:.4}, of CLS tokens {:.4}",
        patches / n,
        cls / n
    );
    Ok(())
}
