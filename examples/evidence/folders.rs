//! How well p-values and the estimated share of abnormal images hold when folders are scored as a whole.

use anyhow::{Context, Result, ensure};
use defend_core::evidence::{ClosedForm, Embeddings};
use defend_core::nn::Rng;
use defend_core::train::shuffled_batches;

use crate::{Assets, CIFAR, JUDGED, LEARNT, mean_and_deviation, photos, without_patches};

/// Normal images of a kind, and others.
struct Pool {
    name: &'static str,
    normal: Embeddings,
    abnormal: Embeddings,
}

/// Folders of [`JUDGED`] images, a share of them abnormal, beside [`LEARNT`] normal ones: the share of their normal images below a
/// p-value, over random draws, and of draws whose interval holds the share of abnormal images.
pub(crate) fn measure(assets: &Assets, resamplings: usize, seed: u64) -> Result<()> {
    ensure!(resamplings > 0, "--resamplings: at least 1");
    let ordinary = assets.ordinary()?;
    let config = without_patches();
    println!(
        "| folder | abnormal | normal images with p up to .05 | .10 | .20 | share of abnormal, estimated | interval holds it | compared |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for (stream, pool) in (200..).zip(pools(assets)?) {
        for abnormal in [0.0, 0.1, 0.3] {
            let mut rng = Rng::stream(seed, stream);
            let mut below = [const { Vec::new() }; 3];
            let (mut shares, mut held, mut compared) = (Vec::new(), 0usize, 0usize);
            for _ in 0..resamplings {
                let mut drawn = shuffled_batches(pool.normal.len(), LEARNT, &mut rng).into_iter();
                let learnt = drawn.next().context("an empty pool")?;
                let novel = (abnormal * JUDGED as f64).round() as usize;
                let normal: Vec<usize> = drawn.flatten().take(JUDGED - novel).collect();
                let mut others =
                    shuffled_batches(pool.abnormal.len(), novel.max(1), &mut rng).into_iter();
                let others = others.next().context("an empty pool")?;
                let folder = Embeddings::joined(&[
                    pool.normal.select(&normal),
                    pool.abnormal.select(&others[..novel]),
                ])?;
                let form = ClosedForm::fit(&pool.normal.select(&learnt), Some(&ordinary), &config)?;
                let judged = form.evaluate(&folder, None)?;
                let scores: Vec<f64> = judged.iter().map(|j| j.score).collect();
                let together = form.together(&folder, &scores, None)?;
                let of_normal = together.p_values.get(..normal.len()).unwrap_or_default();
                for (below, limit) in below.iter_mut().zip([0.05, 0.1, 0.2]) {
                    let count = of_normal.iter().filter(|p| **p <= limit).count();
                    below.push(count as f64 / normal.len().max(1) as f64);
                }
                let share = together.abnormal;
                shares.push(share.estimate);
                held += usize::from(share.low <= abnormal && abnormal <= share.high);
                compared += usize::from(together.weight > 0.0);
            }
            let percent = |values: &[f64]| {
                let (mean, deviation) = mean_and_deviation(values);
                format!("{:.1} ± {:.1}", 100.0 * mean, 100.0 * deviation)
            };
            let cells: Vec<String> = below.iter().map(|values| percent(values)).collect();
            let of_draws = |count: usize| 100.0 * count as f64 / resamplings as f64;
            println!(
                "| {} | {:.0} % | {} | {} | {:.1} % | {:.1} % |",
                pool.name,
                100.0 * abnormal,
                cells.join(" | "),
                percent(&shares),
                of_draws(held),
                of_draws(compared)
            );
        }
    }
    Ok(())
}

fn pools(assets: &Assets) -> Result<Vec<Pool>> {
    let classes = |classes: &[&str], count: usize| -> Result<Embeddings> {
        let files = classes
            .iter()
            .map(|class| assets.cifar("train", class, count));
        assets.embed_files(files.collect::<Result<Vec<_>>>()?.concat())
    };
    let cat = classes(&["cat"], 500)?;
    let others: Vec<&str> = CIFAR.into_iter().filter(|name| *name != "cat").collect();
    let (dog, not_dog) = photos(assets, "dog")?;
    Ok(vec![
        Pool {
            name: "VOC, dog",
            normal: dog,
            abnormal: not_dog,
        },
        Pool {
            name: "CIFAR-10, five classes",
            normal: classes(&CIFAR[..5], 200)?,
            abnormal: classes(&CIFAR[5..], 100)?,
        },
        Pool {
            name: "CIFAR-10, cat",
            normal: cat,
            abnormal: classes(&others, 50)?,
        },
    ])
}
