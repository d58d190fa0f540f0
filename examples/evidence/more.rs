//! What more images bring: known abnormal ones, a folder that is scored as a whole, suspects among the normal ones.

use std::sync::Arc;

use anyhow::{Context, Result};
use defend_core::data::{ClassId, Dataset, Difficult, Idx, Split, Subset, Voc};
use defend_core::evidence::{ClosedForm, Embeddings};
use defend_core::metrics::auroc;
use defend_core::nn::Rng;
use defend_core::train::shuffled_batches;
use ndarray::{Array1, Array2, ArrayView1, Axis};

use crate::{Assets, CIFAR, append, mean_and_deviation, spread, without_patches};

/// Known abnormal images.
const KNOWN: [usize; 3] = [1, 5, 20];
/// Shares of abnormal images in a folder, and of wrong ones among the normal.
const ABNORMAL: [f64; 5] = [0.005, 0.02, 0.1, 0.3, 0.5];
const WRONG: [f64; 4] = [0.0, 0.02, 0.05, 0.1];
/// Normal images of a folder, at most.
const FOLDER: usize = 400;
/// Ways to split the other kinds into those that are shown and those that are not.
const SPLITS: u64 = 3;
/// Images of a class that are embedded for training and for tests, at most.
const TRAIN: usize = 300;
const TEST: usize = 200;

/// Images of several kinds, as embeddings.
pub(crate) struct Kinds {
    pub(crate) embeddings: Embeddings,
    /// Rows of each kind.
    pub(crate) train: Vec<Vec<usize>>,
    pub(crate) test: Vec<Vec<usize>>,
}

impl Kinds {
    /// All kinds but some.
    fn others(&self, kinds: &[usize]) -> Vec<usize> {
        (0..self.train.len())
            .filter(|k| !kinds.contains(k))
            .collect()
    }
}

/// A data set with normal kinds, and how many images are learnt.
struct Protocol<'a> {
    name: &'static str,
    kinds: &'a Kinds,
    normal: Vec<Vec<usize>>,
    learnt: usize,
}

/// Everything that the three measurements share.
struct Study {
    ordinary: Embeddings,
    cifar: Kinds,
    fashion: Kinds,
    voc: Kinds,
}

impl Study {
    fn read(assets: &Assets) -> Result<Self> {
        Ok(Self {
            ordinary: assets.ordinary()?,
            cifar: cifar(assets)?,
            fashion: fashion(assets)?,
            voc: voc(assets)?,
        })
    }

    fn protocols(&self) -> Vec<Protocol<'_>> {
        let one = |kinds: &[usize]| kinds.iter().map(|k| vec![*k]).collect::<Vec<_>>();
        let but = |kinds: &[usize]| {
            let all = |left: &usize| (0..10).filter(|k| k != left).collect::<Vec<_>>();
            kinds.iter().map(all).collect::<Vec<_>>()
        };
        let halves = vec![
            vec![0, 1, 2, 3, 4],
            vec![1, 3, 5, 7, 9],
            vec![0, 2, 4, 6, 8],
        ];
        let protocol = |name, kinds, normal, learnt| Protocol {
            name,
            kinds,
            normal,
            learnt,
        };
        vec![
            protocol("VOC, one class", &self.voc, one(&[0, 1, 2, 3, 4]), 100),
            protocol("CIFAR-10, half the classes", &self.cifar, halves, 300),
            protocol(
                "CIFAR-10, one class",
                &self.cifar,
                one(&[0, 2, 3, 5, 8]),
                100,
            ),
            protocol(
                "Fashion-MNIST, all but one",
                &self.fashion,
                but(&[0, 3, 6]),
                300,
            ),
            protocol(
                "Fashion-MNIST, one class",
                &self.fashion,
                one(&[0, 2, 4, 6, 8]),
                100,
            ),
        ]
    }

    fn fit(&self, normal: &Embeddings) -> Result<ClosedForm> {
        Ok(ClosedForm::fit(
            normal,
            Some(&self.ordinary),
            &without_patches(),
        )?)
    }
}

/// `count` random rows of some kinds.
fn draw(rows: &[Vec<usize>], kinds: &[usize], count: usize, rng: &mut Rng) -> Vec<usize> {
    let all: Vec<usize> = kinds
        .iter()
        .filter_map(|k| rows.get(*k))
        .flatten()
        .copied()
        .collect();
    let count = count.min(all.len());
    let order = shuffled_batches(all.len(), count.max(1), rng)
        .into_iter()
        .next();
    let chosen = order.unwrap_or_default().into_iter().take(count);
    chosen.filter_map(|i| all.get(i).copied()).collect()
}

fn scores(form: &ClosedForm, images: &Embeddings) -> Result<Vec<f64>> {
    Ok(form
        .evaluate(images, None)?
        .iter()
        .map(|j| j.score)
        .collect())
}

/// AUROC of abnormal scores against normal ones; `None` without abnormal ones.
fn area(normal: &[f64], abnormal: &[f64]) -> Result<Option<f64>> {
    if abnormal.is_empty() {
        return Ok(None);
    }
    let all = [normal, abnormal].concat();
    let truth: Vec<bool> = (0..all.len()).map(|i| i >= normal.len()).collect();
    Ok(Some(auroc(
        ArrayView1::from(&all),
        ArrayView1::from(&truth),
    )?))
}

fn mean(values: &[f64]) -> f64 {
    mean_and_deviation(values).0
}

fn three(value: Option<f64>) -> String {
    value.map_or("-".into(), |v| format!("{v:.3}"))
}

/// All three measurements, a Markdown table each.
pub(crate) fn measure(assets: &Assets, seed: u64) -> Result<()> {
    let study = Study::read(assets)?;
    for table in [known, together, suspects] {
        table(&study, seed)?;
        println!();
    }
    Ok(())
}

/// AUROC on kinds that were shown and on kinds that were not, with known abnormal images.
fn known(study: &Study, seed: u64) -> Result<()> {
    println!(
        "| normal, images | kinds | without | {} | logistic regression, {} | worst change, {} |",
        KNOWN.map(|k| format!("{k} known")).join(" | "),
        KNOWN[2],
        KNOWN[2]
    );
    println!("|---|---|---|{}---|---|", "---|".repeat(KNOWN.len()));
    for protocol in study.protocols() {
        // Shown, then not shown; without, with each number, and of the regression.
        let mut found = [const { [const { Vec::new() }; KNOWN.len() + 2] }; 2];
        for (set, normal) in (0..).zip(&protocol.normal) {
            for split in 0..SPLITS {
                let mut rng = Rng::stream(seed, 100 * set + split);
                let areas = known_once(study, &protocol, normal, &mut rng)?;
                for (all, areas) in found.iter_mut().zip(areas) {
                    for (all, area) in all.iter_mut().zip(areas) {
                        all.extend(area);
                    }
                }
            }
        }
        for (kinds, columns) in ["shown", "not shown"].into_iter().zip(&found) {
            let Some((without, rest)) = columns.split_first().filter(|(w, _)| !w.is_empty()) else {
                continue;
            };
            let changes = rest.get(KNOWN.len() - 1).into_iter().flatten().zip(without);
            let worst = changes
                .map(|(with, w)| with - w)
                .fold(f64::INFINITY, f64::min);
            let cells: Vec<String> = columns.iter().map(|c| format!("{:.3}", mean(c))).collect();
            println!(
                "| {}, {} | {kinds} | {} | {worst:+.3} |",
                protocol.name,
                protocol.learnt,
                cells.join(" | ")
            );
        }
    }
    Ok(())
}

type Areas = [[Option<f64>; KNOWN.len() + 2]; 2];

fn known_once(
    study: &Study,
    protocol: &Protocol<'_>,
    normal: &[usize],
    rng: &mut Rng,
) -> Result<Areas> {
    let kinds = protocol.kinds;
    let others = kinds.others(normal);
    let mut order = shuffled_batches(others.len(), others.len(), rng).concat();
    for kind in &mut order {
        *kind = others[*kind];
    }
    let (shown, unseen) = order.split_at(others.len().div_ceil(2));
    let learnt = kinds
        .embeddings
        .select(&draw(&kinds.train, normal, protocol.learnt, rng));
    let abnormal = draw(&kinds.train, shown, KNOWN[2], rng);
    let rows = |of: &[usize]| draw(&kinds.test, of, usize::MAX, &mut Rng::seed(0));
    let tests =
        [rows(normal), rows(shown), rows(unseen)].map(|rows| kinds.embeddings.select(&rows));
    let areas = |judge: &dyn Fn(&Embeddings) -> Result<Vec<f64>>| -> Result<[Option<f64>; 2]> {
        let [normal, shown, unseen] = &tests;
        let normal = judge(normal)?;
        let of = |images: &Embeddings| -> Result<Option<f64>> {
            if images.is_empty() {
                return Ok(None);
            }
            area(&normal, &judge(images)?)
        };
        Ok([of(shown)?, of(unseen)?])
    };
    let mut found: Areas = Default::default();
    let mut put = |column: usize, values: [Option<f64>; 2]| {
        for (row, value) in found.iter_mut().zip(values) {
            if let Some(cell) = row.get_mut(column) {
                *cell = value;
            }
        }
    };
    let plain = study.fit(&learnt)?;
    put(0, areas(&|images| scores(&plain, images))?);
    for (column, count) in (1..).zip(KNOWN) {
        let mut form = plain.clone();
        form.learn_abnormal(
            &kinds
                .embeddings
                .select(&abnormal[..count.min(abnormal.len())]),
        )?;
        put(column, areas(&|images| scores(&form, images))?);
    }
    let weights = logistic(&learnt, &kinds.embeddings.select(&abnormal));
    put(
        KNOWN.len() + 1,
        areas(&|images| Ok(images.features(usize::MAX).dot(&weights).to_vec()))?,
    );
    Ok(found)
}

/// Logistic regression with a ridge on unit features, both classes weighted alike, by gradient descent: its weights.
fn logistic(normal: &Embeddings, abnormal: &Embeddings) -> Array1<f64> {
    const STEPS: usize = 500;
    const RATE: f64 = 10.0;
    const RIDGE: f64 = 1e-3;
    let classes = [
        (normal.features(usize::MAX), 0.0),
        (abnormal.features(usize::MAX), 1.0),
    ];
    let mut weights = Array1::<f64>::zeros(classes[0].0.ncols());
    let mut offset = 0.0;
    for _ in 0..STEPS {
        let (mut slope, mut shift) = (RIDGE * &weights, 0.0);
        for (rows, target) in &classes {
            let residual = rows
                .dot(&weights)
                .mapv(|v| 1.0 / (1.0 + (-v - offset).exp()) - target);
            let share = 0.5 / rows.nrows() as f64;
            slope.scaled_add(share, &rows.t().dot(&residual));
            shift += share * residual.sum();
        }
        weights.scaled_add(-RATE, &slope);
        offset -= RATE * shift;
    }
    weights
}

/// AUROC of a folder whose images are scored one by one and together.
fn together(study: &Study, seed: u64) -> Result<()> {
    println!(
        "| alone -> together, asked for | {} |",
        ABNORMAL
            .map(|s| format!("{:.1} % abnormal", 100.0 * s))
            .join(" | ")
    );
    println!("|---|{}", "---|".repeat(ABNORMAL.len()));
    for protocol in study.protocols() {
        let mut cells = Vec::new();
        for share in ABNORMAL {
            let mut found = [const { Vec::new() }; 3];
            for (set, normal) in (0..).zip(&protocol.normal) {
                let mut rng = Rng::stream(seed, 1000 + set);
                let areas = together_once(study, &protocol, normal, share, &mut rng)?;
                for (all, area) in found.iter_mut().zip(areas) {
                    all.extend(area);
                }
            }
            let [alone, both, forced] = found.map(|values| mean(&values));
            cells.push(format!("{alone:.3} -> {both:.3}, {forced:.3}"));
        }
        println!(
            "| {}, {} | {} |",
            protocol.name,
            protocol.learnt,
            cells.join(" | ")
        );
    }
    Ok(())
}

fn together_once(
    study: &Study,
    protocol: &Protocol<'_>,
    normal: &[usize],
    share: f64,
    rng: &mut Rng,
) -> Result<[Option<f64>; 3]> {
    let kinds = protocol.kinds;
    let others = kinds.others(normal);
    let form = study.fit(&kinds.embeddings.select(&draw(
        &kinds.train,
        normal,
        protocol.learnt,
        rng,
    )))?;
    let mut rows = draw(&kinds.test, normal, FOLDER, rng);
    let normals = rows.len();
    let wanted = (normals as f64 * share / (1.0 - share)).round().max(1.0) as usize;
    rows.extend(draw(&kinds.test, &others, wanted, rng));
    let folder = kinds.embeddings.select(&rows);
    let alone = scores(&form, &folder)?;
    let both = form.together(&folder, &alone, None)?.scores;
    let forced = form.together(&folder, &alone, Some(0.3))?.scores;
    let of = |scores: &[f64]| {
        let (normal, abnormal) = scores.split_at(normals);
        area(normal, abnormal)
    };
    Ok([of(&alone)?, of(&both)?, of(&forced)?])
}

/// Wrong images among the normal ones: what they cost, and whether they are found.
fn suspects(study: &Study, seed: u64) -> Result<()> {
    println!(
        "| normal, images | wrong | AUROC | suspects dropped | wrong ones among as many first suspects | 5-NN | Mahalanobis |"
    );
    println!("|---|---|---|---|---|---|---|");
    for protocol in study.protocols() {
        for share in WRONG {
            let mut found = [const { Vec::new() }; 5];
            for (set, normal) in (0..).zip(&protocol.normal) {
                let mut rng = Rng::stream(seed, 2000 + set);
                let values = suspects_once(study, &protocol, normal, share, &mut rng)?;
                for (all, value) in found.iter_mut().zip(values) {
                    all.extend(value);
                }
            }
            let cells = found.map(|values| three((!values.is_empty()).then(|| mean(&values))));
            println!(
                "| {}, {} | {:.0} % | {} |",
                protocol.name,
                protocol.learnt,
                100.0 * share,
                cells.join(" | ")
            );
        }
    }
    Ok(())
}

fn suspects_once(
    study: &Study,
    protocol: &Protocol<'_>,
    normal: &[usize],
    share: f64,
    rng: &mut Rng,
) -> Result<[Option<f64>; 5]> {
    let kinds = protocol.kinds;
    let others = kinds.others(normal);
    let wrong = (protocol.learnt as f64 * share).round() as usize;
    let mut rows = draw(&kinds.train, normal, protocol.learnt - wrong, rng);
    let right = rows.len();
    rows.extend(draw(&kinds.train, &others, wrong, rng));
    let learnt = kinds.embeddings.select(&rows);
    let form = study.fit(&learnt)?;
    let tests = [normal, &others].map(|of| {
        kinds
            .embeddings
            .select(&draw(&kinds.test, of, usize::MAX, &mut Rng::seed(0)))
    });
    let judged = |form: &ClosedForm| area(&scores(form, &tests[0])?, &scores(form, &tests[1])?);
    let plain = judged(&form)?;
    if wrong == 0 {
        return Ok([plain, None, None, None, None]);
    }
    let odd = form.images_of_suspects(&learnt, wrong)?;
    let kept: Vec<usize> = (0..learnt.len())
        .filter(|i| odd.binary_search(i).is_err())
        .collect();
    let dropped = judged(&study.fit(&learnt.select(&kept))?)?;
    let share_of = |order: &[usize]| {
        let hits = order.iter().take(wrong).filter(|i| **i >= right).count();
        Some(hits as f64 / wrong as f64)
    };
    let first: Vec<usize> = form
        .suspects(wrong)?
        .iter()
        .map(|s| form.kept()[s.image])
        .collect();
    let last = learnt
        .parts()
        .get(1)
        .context("no CLS tokens of the last block")?;
    let [near, far] = [isolation(last), mahalanobis(last, last)?].map(|values| {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
        order
    });
    Ok([
        plain,
        dropped,
        share_of(&first),
        share_of(&near),
        share_of(&far),
    ])
}

/// Mean distance of each row to its five nearest others, at unit length.
fn isolation(rows: &Array2<f32>) -> Vec<f64> {
    let rows = rows.mapv(f64::from);
    let norms = rows.map_axis(Axis(1), |row| row.dot(&row).sqrt().max(1e-12));
    let unit = rows / norms.insert_axis(Axis(1));
    let similarities = unit.dot(&unit.t());
    let of = |(i, row): (usize, ArrayView1<'_, f64>)| {
        let mut others: Vec<f64> = row
            .iter()
            .enumerate()
            .filter(|(j, _)| *j != i)
            .map(|(_, s)| *s)
            .collect();
        others.sort_by(|a, b| b.total_cmp(a));
        let nearest = &others[..others.len().min(5)];
        1.0 - nearest.iter().sum::<f64>() / nearest.len() as f64
    };
    similarities
        .rows()
        .into_iter()
        .enumerate()
        .map(of)
        .collect()
}

/// Squared Mahalanobis distance of each row of `judged` to `learnt`, the covariance drawn a tenth towards its mean variance.
pub(crate) fn mahalanobis(learnt: &Array2<f32>, judged: &Array2<f32>) -> Result<Vec<f64>> {
    let learnt = learnt.mapv(f64::from);
    let mean = learnt.mean_axis(Axis(0)).context("no rows")?;
    let centred = &learnt - &mean;
    let covariance = centred.t().dot(&centred) / learnt.nrows() as f64;
    let width = learnt.ncols();
    let variance = covariance.diag().sum() / width as f64;
    let shrunk = 0.9 * covariance + 0.1 * variance * Array2::<f64>::eye(width);
    // Rows times the inverse by conjugate gradients: the matrix is small and well conditioned.
    let solve = |row: ArrayView1<'_, f64>| -> f64 {
        let (mut x, mut residual) = (Array1::<f64>::zeros(width), row.to_owned());
        let (mut direction, mut size) = (residual.clone(), residual.dot(&residual));
        for _ in 0..200 {
            if size < 1e-18 {
                break;
            }
            let image = shrunk.dot(&direction);
            let step = size / direction.dot(&image);
            x.scaled_add(step, &direction);
            residual.scaled_add(-step, &image);
            let next = residual.dot(&residual);
            direction = &residual + &(direction * (next / size));
            size = next;
        }
        x.dot(&row)
    };
    let judged = judged.mapv(f64::from) - &mean;
    Ok(judged.rows().into_iter().map(solve).collect())
}

pub(crate) fn cifar(assets: &Assets) -> Result<Kinds> {
    let mut paths = Vec::new();
    let (mut train, mut test) = (Vec::new(), Vec::new());
    for name in CIFAR {
        train.push(append(&mut paths, assets.cifar("train", name, TRAIN)?));
        test.push(append(&mut paths, assets.cifar("test", name, TEST)?));
    }
    Ok(Kinds {
        embeddings: assets.embed_files(paths)?,
        train,
        test,
    })
}

/// Kinds of two halves of a data set.
fn of_halves<D: Dataset + 'static>(
    assets: &Assets,
    halves: [&Arc<D>; 2],
    kinds: &[ClassId],
    belongs: &dyn Fn(&D, usize, ClassId) -> bool,
) -> Result<Kinds> {
    let mut parts = Vec::new();
    let mut rows = [Vec::new(), Vec::new()];
    let mut count = 0;
    for ((half, rows), limit) in halves.into_iter().zip(&mut rows).zip([TRAIN, TEST]) {
        let mut chosen = Vec::new();
        for kind in kinds {
            let all: Vec<usize> = (0..half.len())
                .filter(|i| belongs(half, *i, *kind))
                .collect();
            let some = spread(&all, limit);
            rows.push((count..count + some.len()).collect());
            count += some.len();
            chosen.extend(some);
        }
        parts.push(assets.embed(&Arc::new(Subset::new(half.clone(), chosen)?))?);
    }
    let [train, test] = rows;
    Ok(Kinds {
        embeddings: Embeddings::joined(&parts)?,
        train,
        test,
    })
}

pub(crate) fn fashion(assets: &Assets) -> Result<Kinds> {
    let open = |split| Idx::fashion_mnist(assets.folder.join("fashion-mnist"), split);
    let halves = [Arc::new(open(Split::Train)?), Arc::new(open(Split::Test)?)];
    let kinds: Vec<ClassId> = (0..10).map(ClassId).collect();
    of_halves(assets, [&halves[0], &halves[1]], &kinds, &|set, i, kind| {
        set.classes(i).contains(&kind)
    })
}

/// Photos that show one class only, of five animals.
pub(crate) fn voc(assets: &Assets) -> Result<Kinds> {
    let root = assets.folder.join("VOCdevkit/VOC2012");
    let open = |split| Voc::open(&root, split, Difficult::Counted);
    let halves = [Arc::new(open("train")?), Arc::new(open("val")?)];
    let kinds = ["dog", "cat", "horse", "sheep", "cow"];
    let kinds: Option<Vec<ClassId>> = kinds.iter().map(|name| halves[0].class(name)).collect();
    let kinds = kinds.context("VOC lacks a class")?;
    of_halves(assets, [&halves[0], &halves[1]], &kinds, &|set, i, kind| {
        let classes = set.classes(i);
        !classes.is_empty() && classes.iter().all(|class| *class == kind)
    })
}
