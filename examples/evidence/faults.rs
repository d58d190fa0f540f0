//! What known faulty images bring where patches count: MVTec AD screw.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use defend_core::data::{ClassId, Dataset, MvtecAd, Split, Subset};
use defend_core::metrics::auroc;
use defend_core::nn::Rng;
use defend_core::prelude::*;
use defend_core::train::shuffled_batches;
use ndarray::ArrayView1;

use crate::{Assets, mean_and_deviation};

/// Kinds of faults that the known images are of.
const SHOWN: usize = 3;

/// AUROC on kinds of faults that are shown and on those that never are, with `known` faulty images; means over `trials` choices.
pub(crate) fn measure(assets: &Assets, known: &[usize], trials: usize, seed: u64) -> Result<()> {
    ensure!(trials > 0, "--trials: at least 1");
    let root = assets.folder.join("mvtec/screw");
    let test = Arc::new(MvtecAd::open(&root, Split::Test)?);
    let weights = assets.folder.join("weights/vit_tiny_patch16_224");
    let builder = || {
        Defend::builder()
            .teacher(Pretrained::local(&weights))
            .device(assets.device.clone())
    };
    let normal = || MvtecAd::open(&root, Split::Train);
    let mut plain = builder().fit(normal()?, &mut Silent)?.detector;
    let without = scan(&plain, test.clone(), &mut Silent)?.scores();
    let folder = std::env::temp_dir().join("defend-faults");
    std::fs::create_dir_all(&folder)?;
    let file = folder.join("plain.defend");
    plain.save(&file)?;
    let kinds: Vec<u32> = (1..test.class_names().len() as u32).collect();
    let kind = |image: usize| {
        test.classes(image)
            .first()
            .map_or(0, |class: &ClassId| class.0)
    };
    println!(
        "| known | what is learnt | kinds shown | never shown | worst change, shown | never shown |"
    );
    println!("|---|---|---|---|---|---|");
    for (stream, &count) in (300..).zip(known) {
        let mut rng = Rng::stream(seed, stream);
        let names = [
            "nothing",
            "images",
            "and their worst patches",
            "and patches under masks",
        ];
        let mut found = names.map(|_| (Vec::new(), Vec::new()));
        for _ in 0..trials {
            let shown = drawn(&kinds, SHOWN, &mut rng)?;
            let pool: Vec<usize> = (0..test.len())
                .filter(|&i| shown.contains(&kind(i)))
                .collect();
            let learnt = drawn(&pool, count, &mut rng)?;
            let abnormal = || Subset::new(test.clone(), learnt.clone());
            let with = |known: Arc<dyn Dataset>| -> Result<Vec<f64>> {
                let fitted = builder().abnormal(known).fit(normal()?, &mut Silent)?;
                Ok(scan(&fitted.detector, test.clone(), &mut Silent)?.scores())
            };
            plain = Detector::load(&file, &assets.device)?;
            plain.learn_abnormal(abnormal()?, &mut Silent)?;
            let images = scan(&plain, test.clone(), &mut Silent)?.scores();
            // The images without their masks.
            let worst = with(Arc::new(Unmarked(abnormal()?)))?;
            let marked = with(Arc::new(abnormal()?))?;
            let judged = [&without, &images, &worst, &marked];
            for ((shown_area, never_area), scores) in found.iter_mut().zip(judged) {
                let area = |wanted: &dyn Fn(usize) -> bool| -> Result<f64> {
                    let images: Vec<usize> = (0..test.len())
                        .filter(|i| !learnt.contains(i) && (kind(*i) == 0 || wanted(*i)))
                        .collect();
                    let values: Vec<f64> = images.iter().map(|&i| scores[i]).collect();
                    let truth: Vec<bool> = images.iter().map(|&i| kind(i) != 0).collect();
                    Ok(auroc(ArrayView1::from(&values), ArrayView1::from(&truth))?)
                };
                shown_area.push(area(&|i| shown.contains(&kind(i)))?);
                never_area.push(area(&|i| !shown.contains(&kind(i)))?);
            }
        }
        let least = |values: &[f64], before: &[f64]| {
            let changes = values.iter().zip(before).map(|(a, b)| a - b);
            changes.fold(f64::INFINITY, f64::min)
        };
        let (first_shown, first_never) = found[0].clone();
        for (name, (shown, never)) in names.iter().zip(&found) {
            println!(
                "| {count} | {name} | {:.3} | {:.3} | {:+.3} | {:+.3} |",
                mean_and_deviation(shown).0,
                mean_and_deviation(never).0,
                least(shown, &first_shown),
                least(never, &first_never)
            );
        }
    }
    Ok(())
}

/// `count` of some things, at random.
fn drawn<T: Copy>(things: &[T], count: usize, rng: &mut Rng) -> Result<Vec<T>> {
    let batches = shuffled_batches(things.len(), count, rng);
    let first = batches.first().context("MVTec AD screw has no faults")?;
    Ok(first.iter().map(|&i| things[i]).collect())
}

/// A data set whose masks are not told.
struct Unmarked(Subset);

impl Dataset for Unmarked {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn name(&self, index: usize) -> std::borrow::Cow<'_, str> {
        self.0.name(index)
    }

    fn image(&self, index: usize) -> Result<defend_core::data::RgbImage, defend_core::data::Error> {
        self.0.image(index)
    }

    fn classes(&self, index: usize) -> &[ClassId] {
        self.0.classes(index)
    }

    fn class_names(&self) -> &[String] {
        self.0.class_names()
    }
}
