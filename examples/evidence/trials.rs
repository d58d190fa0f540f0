//! Is there more? What other choices than the default's bring on the development sets.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use defend_core::data::{Dataset, ImageFolder, RgbImage, Subset};
use defend_core::embedded_backbone;
use defend_core::evidence::{ClosedForm, Embeddings, EvidenceConfig};
use defend_core::metrics::auroc;
use defend_core::nn::Rng;
use defend_core::train::shuffled_batches;
use defend_core::vit::{TrainScope, Vit};
use ndarray::{Array2, ArrayView1, Axis};

use crate::more::{Kinds, cifar, fashion, mahalanobis, voc};
use crate::{Assets, LEARNT, spread, without_patches};

/// The development sets, as one encoder sees them.
struct Sets {
    voc: Kinds,
    cifar: Kinds,
    fashion: Kinds,
    ordinary: Embeddings,
}

impl Sets {
    fn new(assets: &Assets) -> Result<Self> {
        Ok(Self {
            voc: voc(assets)?,
            cifar: cifar(assets)?,
            fashion: fashion(assets)?,
            ordinary: assets.ordinary()?,
        })
    }
}

/// What is changed of the default.
struct Trial<'a> {
    name: String,
    config: EvidenceConfig,
    /// Parts of the embeddings, in this order.
    parts: &'a [usize],
    /// What is contrasted with, in place of the photos of the sets.
    ordinary: Option<&'a Embeddings>,
    /// Whether scores are whitened by the covariance of the pieces over fresh normal images.
    whitened: bool,
}

impl<'a> Trial<'a> {
    fn new(name: impl Into<String>, parts: &'a [usize]) -> Self {
        let mut config = without_patches();
        // All but the mean patch token, which is the last.
        config.contrast.parts = parts.len().saturating_sub(1).max(1);
        Self {
            name: name.into(),
            config,
            parts,
            ordinary: None,
            whitened: false,
        }
    }
}

/// The parts of [`Sets`] that the default takes: CLS tokens of the last two blocks and the mean patch token.
const DEFAULT: [usize; 3] = [2, 3, 4];

/// Prints a row for each trial.
pub(crate) fn measure(mut assets: Assets, draws: usize, seed: u64) -> Result<()> {
    ensure!(draws > 0, "--draws: at least 1");
    println!(
        "| what | VOC, one class | CIFAR-10, one class | CIFAR-10, five classes | Fashion-MNIST, one class |"
    );
    println!("|---|---|---|---|---|");
    let run = |sets: &Sets, trial: &Trial<'_>| row(sets, trial, draws, seed);

    let folder = assets.folder.clone();
    let whole = Arc::new(ImageFolder::open(folder.join("tiny-imagenet"))?);
    let small = spread(&(0..whole.len()).collect::<Vec<_>>(), 1000);
    let small = Arc::new(Subset::new(whole, small)?);

    assets.blocks = vec![8, 9, 10, 11];
    let sets = Sets::new(&assets)?;
    let small_photos = assets.embed(&small)?;
    run(&sets, &Trial::new("default, 12 blocks", &DEFAULT))?;
    for (name, parts) in [
        ("CLS of the last block, mean patch", &[3, 4][..]),
        ("CLS of the last but one, mean patch", &[2, 4]),
        ("CLS of the last three, mean patch", &[1, 2, 3, 4]),
        ("CLS of the last four, mean patch", &[0, 1, 2, 3, 4]),
        (
            "CLS of the last but one and but two, mean patch",
            &[1, 2, 4],
        ),
    ] {
        run(&sets, &Trial::new(name, parts))?;
    }
    let mut nothing = Trial::new("no background", &DEFAULT);
    nothing.config.contrast.enabled = false;
    run(&sets, &nothing)?;
    for count in [100, 300] {
        let some = spread(&(0..sets.ordinary.len()).collect::<Vec<_>>(), count);
        let some = sets.ordinary.select(&some);
        run(
            &sets,
            &Trial {
                ordinary: Some(&some),
                ..Trial::new(format!("background of {count} photos"), &DEFAULT)
            },
        )?;
    }
    let clothes = sets.fashion.embeddings.select(&sets.fashion.train.concat());
    for (name, wrong) in [
        ("background of 1,000 photos of 64 px", &small_photos),
        ("background of images of clothes", &clothes),
    ] {
        run(
            &sets,
            &Trial {
                ordinary: Some(wrong),
                ..Trial::new(name, &DEFAULT)
            },
        )?;
    }
    for share in [0.005, 0.1] {
        let mut trial = Trial::new(
            format!("contrast counts wholly from a share of {share} (0.02)"),
            &DEFAULT,
        );
        trial.config.contrast.full_share = share;
        run(&sets, &trial)?;
    }
    run(
        &sets,
        &Trial {
            whitened: true,
            ..Trial::new(
                "pieces whitened by their covariance over fresh normal images",
                &DEFAULT,
            )
        },
    )?;
    drop(sets);

    let teacher = assets.teacher.copy(TrainScope::Frozen)?;
    with_four_blocks(&mut assets, draws, seed)?;
    at_larger_sizes(&mut assets, &teacher, draws, seed)?;
    assets.teacher = teacher;
    assets.blocks = vec![10, 11];
    println!();
    by_colour_and_texture(&assets, draws, seed)
}

/// The backbone that ships inside.
fn with_four_blocks(assets: &mut Assets, draws: usize, seed: u64) -> Result<()> {
    assets.teacher = embedded_backbone().load(TrainScope::Frozen, &assets.device)?;
    assets.blocks = vec![0, 1, 2, 3];
    let sets = Sets::new(assets)?;
    for (name, parts) in [
        ("default, 4 blocks", &DEFAULT[..]),
        ("4 blocks, CLS of the last block, mean patch", &[3, 4]),
        ("4 blocks, CLS of the last three, mean patch", &[1, 2, 3, 4]),
    ] {
        row(&sets, &Trial::new(name, parts), draws, seed)?;
    }
    Ok(())
}

/// Photos at more pixels.
fn at_larger_sizes(assets: &mut Assets, teacher: &Vit, draws: usize, seed: u64) -> Result<()> {
    assets.blocks = vec![8, 9, 10, 11];
    for size in [224, 336, 448] {
        assets.teacher = teacher.resized(size, TrainScope::Frozen)?;
        let start = Instant::now();
        let (kinds, ordinary) = (voc(assets)?, assets.ordinary()?);
        let seconds = start.elapsed().as_secs_f64();
        let trial = Trial::new("", &DEFAULT);
        let found = mean_auroc(&kinds, &one_each(&kinds), &ordinary, &trial, draws, seed)?;
        println!(
            "| photos at {size} px ({seconds:.0} s for the passes) | {:.1} | | | |",
            100.0 * found
        );
    }
    Ok(())
}

fn row(sets: &Sets, trial: &Trial<'_>, draws: usize, seed: u64) -> Result<()> {
    let ordinary = trial.ordinary.unwrap_or(&sets.ordinary);
    let halves = vec![vec![0, 1, 2, 3, 4], vec![1, 3, 5, 7, 9]];
    let mut cells = Vec::new();
    for (kinds, normal) in [
        (&sets.voc, one_each(&sets.voc)),
        (&sets.cifar, one_each(&sets.cifar)),
        (&sets.cifar, halves),
        (&sets.fashion, one_each(&sets.fashion)),
    ] {
        let found = mean_auroc(kinds, &normal, ordinary, trial, draws, seed)?;
        cells.push(format!("{:.1}", 100.0 * found));
    }
    println!("| {} | {} |", trial.name, cells.join(" | "));
    Ok(())
}

/// Each kind alone is normal in turn.
fn one_each(kinds: &Kinds) -> Vec<Vec<usize>> {
    (0..kinds.train.len()).map(|kind| vec![kind]).collect()
}

/// Mean AUROC over sets of normal kinds and draws of [`LEARNT`] of their training images.
fn mean_auroc(
    kinds: &Kinds,
    normal: &[Vec<usize>],
    ordinary: &Embeddings,
    trial: &Trial<'_>,
    draws: usize,
    seed: u64,
) -> Result<f64> {
    let (all, ordinary) = (
        parts_of(&kinds.embeddings, trial.parts)?,
        parts_of(ordinary, trial.parts)?,
    );
    let judged = all.select(&kinds.test.concat());
    let mut sum = 0.0;
    for (stream, set) in (400..).zip(normal) {
        let pool: Vec<usize> = set
            .iter()
            .flat_map(|&kind| kinds.train[kind].clone())
            .collect();
        let truth: Vec<bool> = (0..kinds.test.len())
            .flat_map(|kind| vec![!set.contains(&kind); kinds.test[kind].len()])
            .collect();
        let mut rng = Rng::stream(seed, stream);
        for _ in 0..draws {
            let order = shuffled_batches(pool.len(), pool.len(), &mut rng);
            let order = order.first().context("an empty pool")?;
            let rows: Vec<usize> = order.iter().map(|&i| pool[i]).collect();
            let (learnt, fresh) = rows.split_at(LEARNT.min(rows.len()));
            let form = ClosedForm::fit(&all.select(learnt), Some(&ordinary), &trial.config)?;
            let scores = if trial.whitened && !fresh.is_empty() {
                whitened(&form, &all.select(fresh), &judged)?
            } else {
                let judged = form.evaluate(&judged, None)?;
                judged.iter().map(|judgement| judgement.score).collect()
            };
            sum += auroc(ArrayView1::from(&scores), ArrayView1::from(&truth))?;
        }
    }
    Ok(sum / (normal.len() * draws) as f64)
}

fn parts_of(embeddings: &Embeddings, parts: &[usize]) -> Result<Embeddings> {
    let of = |part: &usize| {
        embeddings
            .parts()
            .get(*part)
            .cloned()
            .context("no such part")
    };
    Ok(Embeddings::new(
        parts.iter().map(of).collect::<Result<_>>()?,
    )?)
}

/// z of posterior and contrast, summed by the weights that make the sum most certain over normal images: the inverse of their
/// covariance times 1.
fn whitened(form: &ClosedForm, fresh: &Embeddings, judged: &Embeddings) -> Result<Vec<f64>> {
    let pieces = |images: &Embeddings| -> Result<Vec<[f64; 2]>> {
        let judged = form.evaluate(images, None)?;
        let z = judged
            .iter()
            .map(|j| [j.posterior.z, j.contrast.map_or(0.0, |c| c.z)]);
        Ok(z.collect())
    };
    let normal = pieces(fresh)?;
    let count = normal.len() as f64;
    let mean: [f64; 2] = [0, 1].map(|i| normal.iter().map(|z| z[i]).sum::<f64>() / count);
    let covariance = |i: usize, j: usize| {
        let products = normal.iter().map(|z| (z[i] - mean[i]) * (z[j] - mean[j]));
        products.sum::<f64>() / count + if i == j { 1e-3 } else { 0.0 }
    };
    let (a, b, c) = (covariance(0, 0), covariance(0, 1), covariance(1, 1));
    let weights = if form.contrast_weight() > 0.0 {
        [(c - b).max(0.0), (a - b).max(0.0)]
    } else {
        [1.0, 0.0]
    };
    let sum = |z: &[f64; 2]| weights[0] * z[0] + weights[1] * z[1];
    Ok(pieces(judged)?.iter().map(sum).collect())
}

/// AUROC where the normal images share nothing but a colour or a texture, beside three of the references.
fn by_colour_and_texture(assets: &Assets, draws: usize, seed: u64) -> Result<()> {
    let whole = Arc::new(ImageFolder::open(assets.folder.join("tiny-imagenet"))?);
    let some = Arc::new(Subset::new(
        whole.clone(),
        spread(&(0..whole.len()).collect::<Vec<_>>(), 3000),
    )?);
    let (embeddings, ordinary) = (assets.embed(&some)?, assets.ordinary()?);
    let looks: Vec<[f64; 3]> = (0..some.len())
        .map(|i| Ok(look(&some.image(i)?)))
        .collect::<Result<_>>()?;
    let column = |of: fn(&[f64; 3]) -> f64| -> Vec<f64> { looks.iter().map(of).collect() };
    println!(
        "| normal, a fifth of 3,000 photos of 64 px | default | mean CLS | 5-NN | Mahalanobis |"
    );
    println!("|---|---|---|---|---|");
    for (stream, (name, values)) in (500..).zip([
        ("the bluest", column(|look| look[0])),
        ("the reddest", column(|look| look[1])),
        ("the roughest", column(|look| look[2])),
        ("the smoothest", column(|look| -look[2])),
    ]) {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
        let (normal, others) = order.split_at(order.len() / 5);
        let mut rng = Rng::stream(seed, stream);
        let mut sums = [0.0; 4];
        for _ in 0..draws {
            let drawn = shuffled_batches(normal.len(), normal.len(), &mut rng);
            let drawn = drawn.first().context("no images")?;
            let rows: Vec<usize> = drawn.iter().map(|&i| normal[i]).collect();
            let (learnt, fresh) = rows.split_at(LEARNT);
            let judged: Vec<usize> = fresh.iter().chain(others).copied().collect();
            let truth: Vec<bool> = (0..judged.len()).map(|i| i >= fresh.len()).collect();
            let (learnt, judged) = (embeddings.select(learnt), embeddings.select(&judged));
            let form = ClosedForm::fit(&learnt, Some(&ordinary), &without_patches())?;
            let ours = form
                .evaluate(&judged, None)?
                .iter()
                .map(|j| j.score)
                .collect();
            let [cosine, nearest] = by_ten_lines(&learnt, &judged)?;
            let mahalanobis = mahalanobis(last_cls(&learnt)?, last_cls(&judged)?)?;
            for (sum, scores) in sums.iter_mut().zip([ours, cosine, nearest, mahalanobis]) {
                let scores: Vec<f64> = scores;
                *sum += auroc(ArrayView1::from(&scores), ArrayView1::from(&truth))?;
            }
        }
        let cells = sums.map(|sum| format!("{:.1}", 100.0 * sum / draws as f64));
        println!("| {name} | {} |", cells.join(" | "));
    }
    Ok(())
}

/// Blueness, redness and roughness of an image.
fn look(image: &RgbImage) -> [f64; 3] {
    let count = f64::from(image.width() * image.height()).max(1.0);
    let mut sums = [0.0; 3];
    let grey = |x: u32, y: u32| {
        let [r, g, b] = image.get_pixel(x, y).0.map(f64::from);
        (r + g + b) / 3.0
    };
    for (x, y, pixel) in image.enumerate_pixels() {
        let [r, g, b] = pixel.0.map(f64::from);
        sums[0] += b - f64::midpoint(r, g);
        sums[1] += r - f64::midpoint(g, b);
        if x > 0 && y > 0 {
            sums[2] += (grey(x, y) - grey(x - 1, y)).abs() + (grey(x, y) - grey(x, y - 1)).abs();
        }
    }
    sums.map(|sum| sum / count)
}

fn last_cls(embeddings: &Embeddings) -> Result<&Array2<f32>> {
    let part = embeddings.parts().get(1);
    part.context("no CLS token of the last block")
}

/// The last block's CLS tokens at unit length.
fn cls(embeddings: &Embeddings) -> Result<Array2<f64>> {
    let mut rows = last_cls(embeddings)?.mapv(f64::from);
    for mut row in rows.rows_mut() {
        let norm = row.dot(&row).sqrt().max(1e-12);
        row.mapv_inplace(|v| v / norm);
    }
    Ok(rows)
}

/// 1 - cosine to the mean CLS token, and to the five nearest.
fn by_ten_lines(learnt: &Embeddings, judged: &Embeddings) -> Result<[Vec<f64>; 2]> {
    let (x, q) = (cls(learnt)?, cls(judged)?);
    let mean = x.mean_axis(Axis(0)).context("no images")?;
    let cosine = q.dot(&mean).mapv(|v| -v).to_vec();
    let similar = q.dot(&x.t());
    let nearest = similar.rows().into_iter().map(|row| {
        let mut row = row.to_vec();
        row.sort_by(|a, b| b.total_cmp(a));
        -row.iter().take(5).sum::<f64>()
    });
    Ok([cosine, nearest.collect()])
}
