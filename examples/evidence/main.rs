//! Measurements of the closed form behind docs/METHOD.md: how well thresholds from left-out values hold, what a fit on many
//! images costs, and what the local posterior loses against the exact one.
//!
//! `cargo run --release --bin evidence -- --assets DIR thresholds`

mod additions;
mod faults;
mod folders;
mod more;
mod precision;
mod trials;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use defend_core::data::{Dataset, Difficult, MultiObject, Protocol, ResizeMode, Subset, Voc};
use defend_core::evidence::{ClosedForm, Embeddings, EvidenceConfig, Judgement};
use defend_core::metrics::{auroc, threshold_for};
use defend_core::nn::{Rng, normal};
use defend_core::prelude::*;
use defend_core::train::shuffled_batches;
use defend_core::vit::{Encoder, ImageSource, TrainScope, Vit};
use defend_core::{Background, DType, ResizedImages, Tensor, preprocess_of};
use ndarray::{Array2, ArrayView1, Axis, concatenate};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The classes of CIFAR-10, in their usual order.
const CIFAR: [&str; 10] = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
];
/// Images in memory at a time.
const READ: usize = 512;
/// Images of one pass through the teacher, and queries that are judged together.
const BATCH: usize = 32;
/// Images of a resampling that are learnt, and at most judged.
const LEARNT: usize = 100;
const JUDGED: usize = 300;
/// Clusters of the synthetic embeddings, channels of a part, and noise around centres of deviation 1: images of a cluster are
/// at a third of the distance of others, far above `group_share`.
const CENTRES: usize = 200;
const CHANNELS: usize = 192;
const NOISE: f64 = 0.7;

/// Measures the closed form; each measurement prints a Markdown table.
#[derive(Parser)]
struct Arguments {
    /// Folder with the data sets and `weights/vit_tiny_patch16_224`.
    #[arg(long)]
    assets: PathBuf,
    /// Seed of everything random.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(subcommand)]
    measurement: Measurement,
}

/// What to measure.
#[derive(Subcommand)]
enum Measurement {
    /// False alarms of thresholds from left-out values.
    Thresholds {
        /// Random draws of 100 normal images from each data set.
        #[arg(long, default_value_t = 500)]
        resamplings: usize,
    },
    /// p-values and the estimated share of abnormal images of folders that are scored as a whole.
    Folders {
        /// Random draws of 100 normal images and a folder from each data set.
        #[arg(long, default_value_t = 500)]
        resamplings: usize,
    },
    /// Time of normal images that are added one by one, beside a fit on all.
    Additions {
        /// Number of images.
        #[arg(long, default_value_t = 1000)]
        images: usize,
    },
    /// AUROC on MVTec AD screw with known faulty images.
    Faults {
        /// Number of known images. May be given several times.
        #[arg(long, default_values_t = [5, 20])]
        known: Vec<usize>,
        /// Random choices of the kinds of faults that are shown, and of the images.
        #[arg(long, default_value_t = 6)]
        trials: usize,
    },
    /// What other blocks, backgrounds, sizes and weights would bring, and normal images that share a colour or a texture alone.
    Trials {
        /// Random draws of 100 normal images of each set.
        #[arg(long, default_value_t = 2)]
        draws: usize,
    },
    /// Time and memory of a fit on many synthetic embeddings.
    Large {
        /// Number of embeddings.
        #[arg(long, default_value_t = 50_000)]
        images: usize,
    },
    /// AUROC of the exact and of the local posterior on the same 4,000 images.
    Approximation,
    /// What more images bring: AUROC with known abnormal ones, beside a logistic regression; AUROC of folders that are scored as a
    /// whole; wrong images among the normal ones, what they cost, and whether they are found.
    More,
    /// AUROC with the ordinary photos in full precision, and in the eight bits of a file.
    Precision {
        /// File that `defend background` made from the same photos.
        #[arg(long)]
        background: PathBuf,
        /// Random draws of 100 normal images of each set.
        #[arg(long, default_value_t = 3)]
        draws: usize,
    },
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    match arguments.measurement {
        Measurement::Thresholds { resamplings } => thresholds(
            &Assets::open(arguments.assets)?,
            resamplings,
            arguments.seed,
        ),
        Measurement::Folders { resamplings } => folders::measure(
            &Assets::open(arguments.assets)?,
            resamplings,
            arguments.seed,
        ),
        Measurement::Additions { images } => {
            additions::measure(&Assets::open(arguments.assets)?, images)
        }
        Measurement::Faults { known, trials } => faults::measure(
            &Assets::open(arguments.assets)?,
            &known,
            trials,
            arguments.seed,
        ),
        Measurement::Trials { draws } => {
            trials::measure(Assets::open(arguments.assets)?, draws, arguments.seed)
        }
        Measurement::Large { images } => large(images, arguments.seed),
        Measurement::Approximation => approximation(&Assets::open(arguments.assets)?),
        Measurement::More => more::measure(&Assets::open(arguments.assets)?, arguments.seed),
        Measurement::Precision { background, draws } => precision::measure(
            &Assets::open(arguments.assets)?,
            &Background::load(background)?,
            draws,
            arguments.seed,
        ),
    }
}

/// The data sets and the teacher that looks at them.
struct Assets {
    folder: PathBuf,
    teacher: Vit,
    device: Device,
    /// Blocks whose CLS tokens are taken, ascending; of the last one the mean patch token too.
    blocks: Vec<usize>,
}

impl Assets {
    fn open(folder: PathBuf) -> Result<Self> {
        let device = best_device();
        let weights = folder.join("weights/vit_tiny_patch16_224");
        let teacher = Pretrained::local(&weights).load(TrainScope::Frozen, &device)?;
        Ok(Self {
            folder,
            teacher,
            device,
            blocks: vec![10, 11],
        })
    }

    /// `count` images at even distances of a class of CIFAR-10.
    fn cifar(&self, split: &str, class: &str, count: usize) -> Result<Vec<PathBuf>> {
        let folder = self.folder.join("cifar10").join(split).join(class);
        Ok(spread(ImageFolder::open(folder)?.paths(), count))
    }

    /// The ordinary photos.
    fn ordinary(&self) -> Result<Embeddings> {
        let photos = ImageFolder::open(self.folder.join("imagenet-sample"))?;
        self.embed(&Arc::new(photos))
    }

    /// Embeddings of these files.
    fn embed_files(&self, paths: Vec<PathBuf>) -> Result<Embeddings> {
        self.embed(&Arc::new(ImageFolder::from_paths(paths)))
    }

    /// The CLS tokens of the blocks and the mean patch token of the last.
    fn embed<D: Dataset + 'static>(&self, images: &Arc<D>) -> Result<Embeddings> {
        let start = Instant::now();
        let preprocess = preprocess_of(self.teacher.spec(), ResizeMode::Squash);
        let mut parts = vec![Vec::new(); self.blocks.len() + 1];
        let all: Vec<usize> = (0..images.len()).collect();
        for some in all.chunks(READ) {
            let part = Arc::new(Subset::new(images.clone(), some.to_vec())?);
            let images = ResizedImages::read(
                part,
                preprocess.clone(),
                &self.device,
                usize::MAX,
                true,
                &mut Silent,
            )?;
            let indices: Vec<usize> = (0..images.len()).collect();
            for batch in indices.chunks(BATCH) {
                let layers = self
                    .teacher
                    .intermediates(&images.images(batch)?, &self.blocks)?;
                let last = layers.last().context("no blocks")?;
                let mean_patch = last.patches.to_dtype(DType::F32)?.mean(1)?;
                let cls = layers.iter().map(|layer| layer.cls.clone());
                let tokens: Vec<Tensor> = cls.chain([mean_patch]).collect();
                for (part, tokens) in parts.iter_mut().zip(&tokens) {
                    part.push(matrix(tokens)?);
                }
            }
            if some.len() == READ {
                eprintln!(
                    "  {} of {} embedded, {:.0} s",
                    some.last().map_or(0, |last| last + 1),
                    all.len(),
                    start.elapsed().as_secs_f64()
                );
            }
        }
        let joined = parts.iter().map(|part: &Vec<Array2<f32>>| {
            let views: Vec<_> = part.iter().map(|rows| rows.view()).collect();
            concatenate(Axis(0), &views)
        });
        Ok(Embeddings::new(joined.collect::<Result<_, _>>()?)?)
    }
}

/// The share of other normal images above thresholds from left-out values, over random draws.
fn thresholds(assets: &Assets, resamplings: usize, seed: u64) -> Result<()> {
    ensure!(resamplings > 0, "--resamplings: at least 1");
    let ordinary = assets.ordinary()?;
    let half = CIFAR[..5]
        .iter()
        .map(|class| assets.cifar("train", class, 300))
        .collect::<Result<Vec<_>>>()?;
    let pools = [
        ("VOC, dog", assets.embed(&voc_dogs(&assets.folder)?)?),
        ("CIFAR-10, five classes", assets.embed_files(half.concat())?),
        (
            "CIFAR-10, cat",
            assets.embed_files(assets.cifar("train", "cat", 800)?)?,
        ),
    ];
    let rates = [0.05, 0.1, 0.2];
    let config = without_patches();
    println!(
        "| normal | images | false alarms wanted | found, mean | sd over {resamplings} draws |"
    );
    println!("|---|---|---|---|---|");
    for (stream, (name, pool)) in (0..).zip(&pools) {
        let start = Instant::now();
        let mut rng = Rng::stream(seed, stream);
        let mut found = [const { Vec::new() }; 3];
        for _ in 0..resamplings {
            let mut drawn = shuffled_batches(pool.len(), LEARNT, &mut rng).into_iter();
            let learnt = drawn.next().context("an empty pool")?;
            let others: Vec<usize> = drawn.flatten().take(JUDGED).collect();
            let form = ClosedForm::fit(&pool.select(&learnt), Some(&ordinary), &config)?;
            let judged = form.evaluate(&pool.select(&others), None)?;
            for (found, rate) in found.iter_mut().zip(rates) {
                let limit = threshold_for(
                    ArrayView1::from(form.left_out()),
                    FalseAlarmRate::new(rate)?,
                )?;
                let above = judged.iter().filter(|j| limit.is_novel(j.score)).count();
                found.push(above as f64 / judged.len().max(1) as f64);
            }
        }
        for (found, rate) in found.iter().zip(rates) {
            let (mean, deviation) = mean_and_deviation(found);
            println!(
                "| {name} | {} | {rate:.2} | {mean:.3} | {deviation:.3} |",
                pool.len()
            );
        }
        eprintln!("{name}: {:.0} s", start.elapsed().as_secs_f64());
    }
    Ok(())
}

/// Training images of VOC that show a dog.
fn voc_dogs(assets: &Path) -> Result<Arc<Subset>> {
    let train = Arc::new(voc(assets, "train")?);
    let dog = train.class("dog").context("VOC has no dogs")?;
    let protocol = MultiObject { normal: vec![dog] };
    let shown = protocol.train(&*train);
    Ok(Arc::new(Subset::new(train, shown)?))
}

/// Training images of VOC that show a class, and those that do not.
fn photos(assets: &Assets, class: &str) -> Result<(Embeddings, Embeddings)> {
    let train = Arc::new(voc(&assets.folder, "train")?);
    let class = train.class(class).context("VOC lacks a class")?;
    let all = assets.embed(&train)?;
    let shows = |image: &usize| train.classes(*image).contains(&class);
    let (shown, others): (Vec<usize>, Vec<usize>) = (0..train.len()).partition(shows);
    Ok((all.select(&shown), all.select(&others)))
}

fn voc(assets: &Path, half: &str) -> Result<Voc> {
    let root = assets.join("VOCdevkit/VOC2012");
    Ok(Voc::open(root, half, Difficult::Counted)?)
}

/// Time and memory of a fit on `images` synthetic embeddings.
fn large(images: usize, seed: u64) -> Result<()> {
    ensure!(images > 0, "--images: at least 1");
    let (normal, queries) = {
        let all = synthetic(images + 10 * BATCH, seed)?;
        (
            rows(&all, 0..images),
            rows(&all, images..images + 10 * BATCH),
        )
    };
    let before = peak_memory()?;
    let start = Instant::now();
    let form = ClosedForm::fit(&normal, None, &without_patches())?;
    let fitted = start.elapsed().as_secs_f64();
    let peak = peak_memory()?;
    let start = Instant::now();
    for batch in (0..queries.len()).step_by(BATCH) {
        form.evaluate(&rows(&queries, batch..batch + BATCH), None)?;
    }
    let query = 1000.0 * start.elapsed().as_secs_f64() / queries.len() as f64;
    let summary = form.summary();
    println!(
        "| images | groups | exact | fit | peak memory before it | peak memory | a query, of {BATCH} |"
    );
    println!("|---|---|---|---|---|---|---|");
    println!(
        "| {} | {} | {} | {fitted:.1} s | {before:.0} MiB | {peak:.0} MiB | {query:.2} ms |",
        summary.images, summary.groups, summary.exact
    );
    Ok(())
}

/// Embeddings around random centres.
fn synthetic(images: usize, seed: u64) -> Result<Embeddings> {
    let mut rng = Rng::seed(seed);
    let mut parts = Vec::new();
    for _ in 0..3 {
        let mut draw = |rows: usize, deviation: f64| -> Result<Array2<f32>> {
            let shape = (rows, CHANNELS);
            matrix(&normal(shape, deviation, &mut rng, &Device::Cpu)?)
        };
        let (centres, mut part) = (draw(CENTRES, 1.0)?, draw(images, NOISE)?);
        for (i, mut row) in part.rows_mut().into_iter().enumerate() {
            row += &centres.row(i % CENTRES);
        }
        parts.push(part);
    }
    Ok(Embeddings::new(parts)?)
}

/// The most memory that this process has held so far, in MiB.
fn peak_memory() -> Result<f64> {
    let path = "/proc/self/status";
    let status = std::fs::read_to_string(path).context(path)?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next());
    let kilobytes: f64 = kilobytes
        .context("no VmHWM in /proc/self/status")?
        .parse()?;
    Ok(kilobytes / 1024.0)
}

/// A data set for [`approximation`]: its name, and the classes that are normal.
type Set = (&'static str, &'static [usize]);

const SETS: [Set; 4] = [
    ("airplane to deer", &[0, 1, 2, 3, 4]),
    ("automobile, cat, dog, horse, truck", &[1, 3, 5, 7, 9]),
    ("without airplane", &[1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ("without cat", &[0, 1, 2, 4, 5, 6, 7, 8, 9]),
];

/// AUROC on CIFAR-10 of the exact posterior, and of the local one with several numbers of neighbours.
fn approximation(assets: &Assets) -> Result<()> {
    let ordinary = assets.ordinary()?;
    let (mut paths, mut train, mut test) = (Vec::new(), Vec::new(), Vec::new());
    for (class, name) in CIFAR.iter().enumerate() {
        let in_half = SETS
            .iter()
            .any(|(_, set)| set.len() == 5 && set.contains(&class));
        let count = if in_half { 800 } else { 444 };
        train.push(append(&mut paths, assets.cifar("train", name, count)?));
        test.push(append(&mut paths, assets.cifar("test", name, 200)?));
    }
    let embeddings = assets.embed_files(paths)?;
    let judged = embeddings.select(&test.concat());
    let variants = variants();
    let mut rows: Vec<(String, Vec<f64>)> = Vec::new();
    for (name, set) in SETS {
        let a_class = if set.len() == 5 { 800 } else { 444 };
        let of_class = |class: &usize| train.get(*class).map(|rows| spread(rows, a_class));
        let learnt: Vec<usize> = set.iter().filter_map(of_class).flatten().collect();
        let abnormal: Vec<bool> = (0..CIFAR.len())
            .flat_map(|class| vec![!set.contains(&class); test.get(class).map_or(0, Vec::len)])
            .collect();
        let (mut whole, mut alone) = (Vec::new(), Vec::new());
        for (variant, config) in &variants {
            let start = Instant::now();
            let form = ClosedForm::fit(&embeddings.select(&learnt), Some(&ordinary), config)?;
            let judgements = form.evaluate(&judged, None)?;
            whole.push(area(&judgements, &abnormal, |j| j.score)?);
            alone.push(area(&judgements, &abnormal, |j| j.posterior.z)?);
            eprintln!(
                "{name}, {variant}: {:.0} s, {:?}, contrast {:.2}",
                start.elapsed().as_secs_f64(),
                form.summary(),
                form.contrast_weight()
            );
        }
        rows.push((format!("{name}, score"), whole));
        rows.push((format!("{name}, posterior alone"), alone));
    }
    for kind in ["score", "posterior alone"] {
        let of_kind = rows.iter().filter(|(name, _)| name.ends_with(kind));
        let all: Vec<&Vec<f64>> = of_kind.map(|(_, values)| values).collect();
        let mean = |i| all.iter().filter_map(|v| v.get(i)).sum::<f64>() / all.len() as f64;
        let means = (0..variants.len()).map(mean).collect();
        rows.push((format!("mean, {kind}"), means));
    }
    let names: Vec<&str> = variants.iter().map(|(name, _)| name.as_str()).collect();
    println!("| AUROC | {} |", names.join(" | "));
    println!("|---{}|", "|---".repeat(names.len()));
    for (name, values) in &rows {
        let exact = values.first().copied().unwrap_or(f64::NAN);
        let cell = |(i, v): (usize, &f64)| match i {
            0 => format!("{v:.4}"),
            _ => format!("{v:.4} ({:+.4})", v - exact),
        };
        let cells: Vec<String> = values.iter().enumerate().map(cell).collect();
        println!("| {name} | {} |", cells.join(" | "));
    }
    Ok(())
}

/// The exact posterior, and the local one with 128 neighbours and fewer or more.
fn variants() -> Vec<(String, EvidenceConfig)> {
    let local = |neighbours| {
        let mut config = without_patches();
        config.posterior.exact_images = 2000;
        config.posterior.neighbours = neighbours;
        (format!("local, {neighbours} neighbours"), config)
    };
    let exact = ("exact".to_owned(), without_patches());
    [exact]
        .into_iter()
        .chain([128, 64, 256].map(local))
        .collect()
}

/// The default settings, but patches have no weight.
fn without_patches() -> EvidenceConfig {
    let mut config = EvidenceConfig::default();
    config.patches.weight = 0.0;
    config
}

/// AUROC of something in the judgements, abnormal is positive.
fn area(
    judgements: &[Judgement],
    abnormal: &[bool],
    value: impl Fn(&Judgement) -> f64,
) -> Result<f64> {
    let scores: Vec<f64> = judgements.iter().map(value).collect();
    Ok(auroc(
        ArrayView1::from(&scores),
        ArrayView1::from(abnormal),
    )?)
}

/// Adds paths at the end of others; returns their numbers there.
fn append(paths: &mut Vec<PathBuf>, more: Vec<PathBuf>) -> Vec<usize> {
    let from = paths.len();
    paths.extend(more);
    (from..paths.len()).collect()
}

/// `count` of some items at even distances.
fn spread<T: Clone>(items: &[T], count: usize) -> Vec<T> {
    let (all, count) = (items.len(), count.min(items.len()));
    (0..count)
        .filter_map(|i| items.get(i * all / count).cloned())
        .collect()
}

/// Rows of a tensor `[rows, channels]`.
fn matrix(tensor: &Tensor) -> Result<Array2<f32>> {
    let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    Ok(Array2::from_shape_vec(tensor.dims2()?, values)?)
}

/// Mean, and standard deviation with `n - 1`.
fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (mean, (squares / (n - 1.0).max(1.0)).sqrt())
}

/// Consecutive rows of embeddings.
fn rows(embeddings: &Embeddings, range: Range<usize>) -> Embeddings {
    embeddings.select(&range.collect::<Vec<usize>>())
}
