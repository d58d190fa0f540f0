//! What the eight bits of a background file cost.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use defend_core::Background;
use defend_core::data::{Dataset, MultiObject, Protocol};
use defend_core::evidence::{ClosedForm, Embeddings, Judgement};
use defend_core::nn::Rng;
use defend_core::train::shuffled_batches;

use crate::{Assets, CIFAR, LEARNT, SETS, append, area, voc, without_patches};

/// The classes of VOC's animals and people.
const VOC: [&str; 6] = ["dog", "cat", "person", "horse", "sheep", "cow"];

/// What is normal and what is judged.
struct Question<'a> {
    name: String,
    /// All normal images, of which some are learnt.
    pool: Embeddings,
    judged: &'a Embeddings,
    abnormal: Vec<bool>,
}

/// AUROC on VOC and CIFAR-10 with the ordinary photos in full precision and in eight bits; each class and each set is normal in turn.
pub(crate) fn measure(
    assets: &Assets,
    background: &Background,
    draws: usize,
    seed: u64,
) -> Result<()> {
    let full = assets.ordinary()?;
    let eight = background.embeddings()?;
    ensure!(full.len() == eight.len(), "--background: of other photos");
    println!(
        "| normal | weight of the contrast | full precision | eight bits | largest change of a score |"
    );
    println!("|---|---|---|---|---|");
    let (normal, judged) = photos(assets)?;
    let questions = normal.into_iter().map(|(name, pool, abnormal)| Question {
        name: format!("VOC, {name}"),
        pool,
        judged: &judged,
        abnormal,
    });
    for (stream, question) in (0..).zip(questions) {
        compare(
            &question,
            [&full, &eight],
            draws,
            &mut Rng::stream(seed, 100 + stream),
        )?;
    }
    let (mut paths, mut train, mut test) = (Vec::new(), Vec::new(), Vec::new());
    for name in CIFAR {
        train.push(append(&mut paths, assets.cifar("train", name, 200)?));
        test.push(append(&mut paths, assets.cifar("test", name, 200)?));
    }
    let embeddings = assets.embed_files(paths)?;
    let judged = embeddings.select(&test.concat());
    let alone = CIFAR.iter().enumerate().map(|(i, name)| (*name, vec![i]));
    let sets = alone.chain(SETS.map(|(name, set)| (name, set.to_vec())));
    for (stream, (name, set)) in (0..).zip(sets) {
        let pool = set.iter().filter_map(|c| train.get(*c)).flatten();
        let of_class =
            |class: usize| vec![!set.contains(&class); test.get(class).map_or(0, Vec::len)];
        let question = Question {
            name: format!("CIFAR-10, {name}"),
            pool: embeddings.select(&pool.copied().collect::<Vec<_>>()),
            judged: &judged,
            abnormal: (0..CIFAR.len()).flat_map(of_class).collect(),
        };
        compare(
            &question,
            [&full, &eight],
            draws,
            &mut Rng::stream(seed, stream),
        )?;
    }
    Ok(())
}

/// A class, all its training images, and which of the judged images do not show it.
type OfClass = (&'static str, Embeddings, Vec<bool>);

/// VOC: the training images of each class, and all images that are judged.
fn photos(assets: &Assets) -> Result<(Vec<OfClass>, Embeddings)> {
    let (train, test) = (
        Arc::new(voc(&assets.folder, "train")?),
        Arc::new(voc(&assets.folder, "val")?),
    );
    let (learnt, judged) = (assets.embed(&train)?, assets.embed(&test)?);
    let of_class = |name: &'static str| {
        let class = train
            .class(name)
            .with_context(|| format!("VOC has no {name}"))?;
        let protocol = MultiObject {
            normal: vec![class],
        };
        let pool = learnt.select(&protocol.train(&*train));
        let shows = |image: usize| test.classes(image).contains(&class);
        Ok((
            name,
            pool,
            (0..test.len()).map(|image| !shows(image)).collect(),
        ))
    };
    Ok((
        VOC.into_iter().map(of_class).collect::<Result<_>>()?,
        judged,
    ))
}

/// Prints a row: means over random draws of normal images.
fn compare(
    question: &Question<'_>,
    ordinary: [&Embeddings; 2],
    draws: usize,
    rng: &mut Rng,
) -> Result<()> {
    let (mut sums, mut change, mut weight) = ([0.0; 2], 0f64, 0.0);
    for _ in 0..draws {
        let mut drawn = shuffled_batches(question.pool.len(), LEARNT, rng).into_iter();
        let normal = question
            .pool
            .select(&drawn.next().context("an empty pool")?);
        let mut judge = |ordinary: &Embeddings| -> Result<Vec<Judgement>> {
            let form = ClosedForm::fit(&normal, Some(ordinary), &without_patches())?;
            weight += form.contrast_weight() / (2 * draws) as f64;
            Ok(form.evaluate(question.judged, None)?)
        };
        let both = [judge(ordinary[0])?, judge(ordinary[1])?];
        for (sum, judgements) in sums.iter_mut().zip(&both) {
            *sum += area(judgements, &question.abnormal, |j| j.score)?;
        }
        let [full, eight] = both;
        for (a, b) in full.iter().zip(&eight) {
            change = change.max((a.score - b.score).abs());
        }
    }
    let [full, eight] = sums.map(|sum| sum / draws as f64);
    let name = &question.name;
    println!(
        "| {name} | {weight:.2} | {full:.4} | {eight:.4} ({:+.4}) | {change:.3} |",
        eight - full
    );
    Ok(())
}
