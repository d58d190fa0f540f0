//! How the embedded backbone is made: distillation of a pretrained Vision Transformer into one with fewer blocks, on augmented views
//! of any photos.
//!
//! The student starts from blocks of the teacher. It learns the teacher's patch tokens and CLS token, and those of the block before
//! the last, which the closed form looks at too.
//!
//! `cargo run --release --bin train_backbone -- --weights vit_tiny_patch16_224 --out weights.safetensors --checkpoint run.checkpoint PHOTOS=10`
//!
//! A run that was stopped goes on with `--resume` and ends with the same bits.

mod guide;
mod views;

use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use blake3::Hasher;
use clap::Parser;
use defend_core::data::ResizeMode;
use defend_core::distill::{
    DistillConfig, DistillObjective, DistillRoles, Distiller, FeatureDistance, Mask,
};
use defend_core::nn::Rng;
use defend_core::prelude::*;
use defend_core::train::{Checkpoints, Schedule, Training, TrainingStep};
use defend_core::vit::{
    Backbone, Encoder, ImageSource, TrainScope, Trainable, Vit, WeightPrecision, Weights,
    weights_hash,
};
use defend_core::{Device, Event, Observer, Stage, preprocess_of};

use guide::Guide;
use views::{Photos, Views};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Layers that student and teacher are compared at: the last, and the one before it.
const LAYERS: usize = 2;

/// Distils a pretrained backbone into one with fewer blocks.
#[derive(Parser, Debug)]
struct Arguments {
    /// Weight file or timm folder of the teacher.
    #[arg(long)]
    weights: PathBuf,
    /// File to write: safetensors with matrices in eight bits.
    #[arg(long)]
    out: PathBuf,
    /// Name that the weights carry.
    #[arg(long, default_value = "defend_tiny_patch16_224")]
    name: String,
    /// Weights of an earlier run that the student starts from, in place of the teacher's.
    #[arg(long)]
    start: Option<PathBuf>,
    /// Blocks of the teacher that the student starts from.
    #[arg(long, value_delimiter = ',', default_value = "0,1,3,5,7,9,10,11")]
    blocks: Vec<usize>,
    /// Blocks of the teacher, ascending, that the student's blocks before its last two are to give the tokens of.
    #[arg(long, value_delimiter = ',')]
    guides: Vec<usize>,
    /// Passes over the views.
    #[arg(long, default_value_t = 1)]
    epochs: usize,
    /// Share of the patches that are hidden from the student, 0 for none.
    #[arg(long, default_value_t = 0.0)]
    masked: f64,
    /// Weight of the CLS tokens beside the patch tokens.
    #[arg(long, default_value_t = 1.0)]
    cls_weight: f64,
    /// Images a step.
    #[arg(long, default_value_t = 32)]
    batch_size: usize,
    /// Peak learning rate.
    #[arg(long, default_value_t = 5e-4)]
    learning_rate: f64,
    /// Seed of every random choice.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Every n-th photo is held out to measure the result.
    #[arg(long, default_value_t = 50)]
    held_out: usize,
    /// File that keeps the run, so that it can be resumed.
    #[arg(long)]
    checkpoint: Option<PathBuf>,
    /// Seconds between checkpoints.
    #[arg(long, default_value_t = 300)]
    every: u64,
    /// Goes on from the checkpoint.
    #[arg(long, requires = "checkpoint")]
    resume: bool,
    /// Steps between measurements on the photos that are held out.
    #[arg(long, default_value_t = 1000)]
    measure: usize,
    /// Folders of photos, or text files that name one a line, each with the number of views of a photo: `PATH=20`.
    #[arg(required = true)]
    photos: Vec<String>,
}

impl Arguments {
    /// All that the bits of the run depend on.
    fn run(&self, views: &Views, teacher: &Vit, student: &Vit, used: &[Photos]) -> Result<String> {
        let mut paths = Hasher::new();
        for set in used {
            for path in &set.paths {
                paths.update(path.to_string_lossy().as_bytes());
            }
            paths.update(&set.views.to_le_bytes());
        }
        Ok(format!(
            "train_backbone: {} photos {}, {} views, student {} of {}, {} epochs of batches of {}, guides {:?}, masked {}, CLS {}, rate {}, seed {}, held out {}",
            views.photos(),
            paths.finalize().to_hex(),
            views.len(),
            weights_hash(student)?,
            weights_hash(teacher)?,
            self.epochs,
            self.batch_size,
            self.guides,
            self.masked,
            self.cls_weight,
            self.learning_rate,
            self.seed,
            self.held_out,
        ))
    }

    /// The network to train.
    fn student(&self, teacher: &Vit, device: &Device) -> Result<Vit> {
        let Some(start) = &self.start else {
            return Ok(teacher.with_blocks(&self.blocks, &self.name)?);
        };
        let student = Pretrained::local(start).load(TrainScope::All, device)?;
        Ok(student)
    }

    /// Photos to train on and photos that are held out, set by set.
    fn photos(&self) -> Result<(Vec<Photos>, Vec<Photos>)> {
        let (mut used, mut held_out) = (Vec::new(), Vec::new());
        for text in &self.photos {
            let set = Photos::parse(text)?;
            let nth = self.held_out.max(2);
            let (mut held, mut kept) = (Vec::new(), Vec::new());
            for (i, path) in set.paths.into_iter().enumerate() {
                let target = if i % nth == 0 { &mut held } else { &mut kept };
                target.push(path);
            }
            let photos = |paths, views| Photos { paths, views };
            held_out.push(photos(held, 1));
            used.push(photos(kept, set.views));
        }
        Ok((used, held_out))
    }

    fn config(&self) -> DistillConfig {
        DistillConfig {
            epochs: self.epochs,
            batch_size: self.batch_size,
            mask: match self.masked {
                0.0 => Mask::None,
                ratio => Mask::Random { ratio },
            },
            layers: LAYERS + self.guides.len(),
            cls_weight: self.cls_weight,
            learning_rate: self.learning_rate,
            schedule: Schedule::Cosine {
                warmup: 0.02,
                floor: 0.01,
            },
            drop_path: 0.0,
            // No two steps see the same view of an epoch: a second pass of the teacher costs less than the disk.
            cache_bytes: 0,
            ..DistillConfig::default()
        }
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let device = best_device();
    let teacher = Pretrained::local(&arguments.weights).load(TrainScope::Frozen, &device)?;
    let guide = Guide::new(teacher.copy(TrainScope::Frozen)?, &arguments.guides)?;
    let preprocess = preprocess_of(teacher.spec(), ResizeMode::Squash);

    let (used, held_out) = arguments.photos()?;
    let views = Views::read(&used, preprocess.clone(), arguments.seed, &device)?;
    ensure!(!views.is_empty(), "no photos left to train on");

    let student = arguments.student(&teacher, &device)?;
    let student = student.with_layers(LAYERS + arguments.guides.len())?;
    let parameters = student.parameters();
    let parameters: usize = parameters.iter().map(|(_, v)| v.elem_count()).sum();
    eprintln!(
        "{} photos, {} views, {parameters} parameters",
        views.photos(),
        views.len()
    );
    let held_out = HeldOut::new(&held_out, &preprocess, &guide, &device)?;
    eprintln!("before: {}", held_out.measure(&student)?);

    let config = arguments.config();
    let run = arguments.run(&views, &teacher, &student, &used)?;
    let checkpoints = arguments.checkpoint.as_ref().map(|path| {
        Checkpoints::new(path, run)
            .every(Duration::from_secs(arguments.every))
            .resuming(arguments.resume)
    });
    let mut bar = ProgressBar::new();
    bar.on(&Event::Started {
        stage: Stage::Distill,
        images: (arguments.epochs * views.len()) as u64,
    });
    let (start, mut sum, mut failed) = (Instant::now(), (0.0, 0), None);
    let mut on_step = |step: TrainingStep| {
        bar.on(&Event::Advanced {
            images: step.images as u64,
            step: Some(step),
        });
        sum = (sum.0 + step.loss, sum.1 + 1);
        if step.step.is_multiple_of(arguments.measure.max(1)) {
            match held_out.measure(&student) {
                Ok(found) => eprintln!(
                    "step {} of {}, {:.0} s: loss {:.4}, {found}",
                    step.step,
                    step.steps,
                    start.elapsed().as_secs_f64(),
                    sum.0 / f64::from(sum.1)
                ),
                Err(error) => failed = Some(error),
            }
            sum = (0.0, 0);
        }
        if failed.is_some() {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    };
    let (distance, mut rng) = (
        FeatureDistance::default(),
        Rng::stream(arguments.seed, u64::MAX),
    );
    let roles = DistillRoles {
        teacher: &guide,
        student: &student,
        mask: &config.mask.clone(),
        objective: &distance,
    };
    let training = Training::new(&mut rng, &mut on_step).with_checkpoints(checkpoints.as_ref());
    let report = Distiller::new(config)?.distill(roles, &views, training);
    if let Some(error) = failed {
        return Err(error);
    }
    let report = report?;
    eprintln!(
        "losses {:.4?}, {}",
        report.losses,
        held_out.measure(&student)?
    );
    let student = student.with_layers(LAYERS)?;
    let bytes = student.to_safetensors(WeightPrecision::Int8)?;
    let weights = Weights::from_bytes(&bytes, &arguments.name)?;
    let rounded = Vit::load(student.spec().clone(), weights, TrainScope::Frozen, &device)?;
    eprintln!(
        "in eight bits: {}",
        held_out.measure(&rounded.with_layers(LAYERS)?)?
    );
    std::fs::write(&arguments.out, bytes)?;
    Ok(())
}

/// Photos that are not trained on and the teacher's features of them.
struct HeldOut {
    images: Vec<defend_core::Tensor>,
    /// Unit patch tokens and CLS tokens of each layer, last first.
    expected: Vec<Vec<[defend_core::Tensor; 2]>>,
    photos: usize,
}

impl HeldOut {
    fn new(
        sets: &[Photos],
        preprocess: &defend_core::data::Preprocess,
        teacher: &dyn Backbone,
        device: &Device,
    ) -> Result<Self> {
        let paths: Vec<PathBuf> = sets.iter().flat_map(|set| set.paths.clone()).collect();
        let folder = ImageFolder::from_paths(paths);
        let photos = folder.len();
        let (mut images, mut expected) = (Vec::new(), Vec::new());
        for batch in (0..photos).collect::<Vec<_>>().chunks(32) {
            let mut values = vec![0f32; batch.len() * preprocess.input_len()];
            for (input, &i) in values.chunks_mut(preprocess.input_len()).zip(batch) {
                preprocess.normalize_into(&preprocess.resize(&folder.image(i)?)?, input)?;
            }
            let side = preprocess.size as usize;
            let shape = (batch.len(), 3, side, side);
            let batch = defend_core::Tensor::from_vec(values, shape, device)?;
            expected.push(layers(teacher, &batch)?);
            images.push(batch);
        }
        Ok(Self {
            images,
            expected,
            photos,
        })
    }

    /// Mean squared distance of unit features (0 to 4) to the teacher's.
    fn measure(&self, student: &Vit) -> Result<String> {
        let objective: &dyn DistillObjective = &FeatureDistance::default();
        let mut sums = [[0.0; 2]; LAYERS];
        for (images, expected) in self.images.iter().zip(&self.expected) {
            let found = layers(student, images)?;
            for ((sums, found), expected) in sums.iter_mut().zip(&found).zip(expected) {
                for ((sum, found), expected) in sums.iter_mut().zip(found).zip(expected) {
                    let distances = objective.distances(expected, found)?.mean_all()?;
                    *sum += f64::from(distances.to_scalar::<f32>()?) * images.dim(0)? as f64;
                }
            }
        }
        let mut text = format!("{} photos held out:", self.photos);
        for (layer, [patches, cls]) in sums.into_iter().enumerate() {
            let n = self.photos as f64;
            write!(
                text,
                " layer -{}: patches {:.4}, CLS {:.4};",
                layer + 1,
                patches / n,
                cls / n
            )?;
        }
        Ok(text)
    }
}

/// Patch tokens and CLS tokens of the last layers, last first.
fn layers(
    network: &dyn Backbone,
    images: &defend_core::Tensor,
) -> Result<Vec<[defend_core::Tensor; 2]>> {
    let features = network.features(images)?;
    let last = [features.patches, features.cls];
    let earlier = features
        .intermediates
        .into_iter()
        .map(|l| [l.patches, l.cls]);
    Ok(std::iter::once(last).chain(earlier).collect())
}
