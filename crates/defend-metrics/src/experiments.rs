//! Means over the experiments of a table, such as the ten normal classes of CIFAR-10, and whether two systems differ.

use defend_random::Rng;
use ndarray::{Array1, ArrayView1};
use rand::RngExt;

use crate::{Error, Interval, Metric, quantile};

/// The scores of one system in one experiment.
#[derive(Debug, Clone, Copy)]
pub struct Experiment<'a> {
    /// Scores, larger for more novel.
    pub scores: ArrayView1<'a, f64>,
    /// The truth, `true` for novel.
    pub abnormal: ArrayView1<'a, bool>,
}

/// How much better one system is than another on the same images.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Comparison {
    /// Mean of the metric over the experiments, first less second, with its confidence interval.
    pub difference: Interval,
    /// Two-sided p-value of no difference, `0..=1`.
    pub p_value: f64,
}

/// Mean of `metric` over experiments with its stratified percentile-bootstrap interval.
///
/// In each of the `resamples` the normal and the abnormal images of every experiment are drawn with replacement,
/// independently between experiments: where they share images, the interval is somewhat too narrow or too wide.
/// # Errors
/// As [`bootstrap_interval`](crate::bootstrap_interval); [`Error::Empty`] without experiments.
pub fn mean_interval(
    metric: &dyn Metric,
    experiments: &[Experiment<'_>],
    resamples: usize,
    confidence: f64,
    seed: u64,
) -> Result<Interval, Error> {
    check(resamples, confidence, experiments.len())?;
    let mut estimate = 0.0;
    for experiment in experiments {
        estimate += metric.evaluate(experiment.scores, experiment.abnormal)?;
    }
    let mut rng = Rng::seed(seed);
    let mut draws: Vec<Draw> = experiments.iter().map(|e| Draw::new(e.abnormal)).collect();
    let mut values = Vec::with_capacity(resamples);
    for _ in 0..resamples {
        let mut sum = 0.0;
        for (draw, experiment) in draws.iter_mut().zip(experiments) {
            draw.again(&mut rng);
            sum += draw.evaluate(metric, experiment.scores)?;
        }
        values.push(sum / experiments.len() as f64);
    }
    Ok(interval(
        estimate / experiments.len() as f64,
        values,
        confidence,
    ))
}

/// Compares two systems on the same experiments: `pairs` holds the first and the second system's scores of each.
///
/// The bootstrap draws the same images for both, so that what is hard for both cancels out. The p-value is twice the
/// smaller share of resamples on one side of zero, at least `2 / (resamples + 1)`.
/// # Errors
/// As [`mean_interval`]; [`Error::Length`] when a pair's images differ in number.
pub fn compare(
    metric: &dyn Metric,
    pairs: &[(Experiment<'_>, ArrayView1<'_, f64>)],
    resamples: usize,
    confidence: f64,
    seed: u64,
) -> Result<Comparison, Error> {
    check(resamples, confidence, pairs.len())?;
    let mut estimate = 0.0;
    for (first, second) in pairs {
        if first.scores.len() != second.len() {
            return Err(Error::Length {
                left_name: "scores of the first system",
                left: first.scores.len(),
                right_name: "scores of the second",
                right: second.len(),
            });
        }
        estimate += metric.evaluate(first.scores, first.abnormal)?
            - metric.evaluate(*second, first.abnormal)?;
    }
    let count = pairs.len() as f64;
    let mut rng = Rng::seed(seed);
    let mut draws: Vec<Draw> = pairs.iter().map(|(e, _)| Draw::new(e.abnormal)).collect();
    let mut values = Vec::with_capacity(resamples);
    for _ in 0..resamples {
        let mut sum = 0.0;
        for (draw, (first, second)) in draws.iter_mut().zip(pairs) {
            draw.again(&mut rng);
            sum += draw.evaluate(metric, first.scores)? - draw.evaluate(metric, *second)?;
        }
        values.push(sum / count);
    }
    let share = |on_side: &dyn Fn(&f64) -> bool| {
        (values.iter().filter(|v| on_side(v)).count() + 1) as f64 / (resamples + 1) as f64
    };
    let p_value = (2.0 * share(&|v| *v <= 0.0).min(share(&|v| *v >= 0.0))).min(1.0);
    Ok(Comparison {
        difference: interval(estimate / count, values, confidence),
        p_value,
    })
}

fn check(resamples: usize, confidence: f64, experiments: usize) -> Result<(), Error> {
    quantile::check_resamples(resamples, confidence)?;
    if experiments == 0 {
        return Err(Error::Empty {
            what: "experiments",
        });
    }
    Ok(())
}

fn interval(estimate: f64, mut values: Vec<f64>, confidence: f64) -> Interval {
    values.sort_unstable_by(f64::total_cmp);
    let tail = f64::midpoint(1.0, -confidence);
    Interval {
        low: quantile::of_sorted(&values, tail),
        estimate,
        high: quantile::of_sorted(&values, 1.0 - tail),
    }
}

/// A stratified sample with replacement, by position.
struct Draw {
    normal: Vec<usize>,
    novel: Vec<usize>,
    drawn: Vec<usize>,
    labels: Array1<bool>,
    values: Array1<f64>,
}

impl Draw {
    fn new(abnormal: ArrayView1<'_, bool>) -> Self {
        let (novel, normal): (Vec<usize>, Vec<usize>) =
            (0..abnormal.len()).partition(|&i| abnormal[i]);
        Self {
            drawn: vec![0; abnormal.len()],
            labels: Array1::from_shape_fn(abnormal.len(), |i| i >= normal.len()),
            values: Array1::zeros(abnormal.len()),
            normal,
            novel,
        }
    }

    fn again(&mut self, rng: &mut Rng) {
        for (slot, &is_novel) in self.drawn.iter_mut().zip(&self.labels) {
            let pool = if is_novel { &self.novel } else { &self.normal };
            *slot = pool[rng.random_range(0..pool.len())];
        }
    }

    fn evaluate(&mut self, metric: &dyn Metric, scores: ArrayView1<'_, f64>) -> Result<f64, Error> {
        for (value, &i) in self.values.iter_mut().zip(&self.drawn) {
            *value = scores[i];
        }
        metric.evaluate(self.values.view(), self.labels.view())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Auroc, auroc, bootstrap_interval};

    /// Normal and abnormal scores that overlap, `gap` apart.
    fn scores(gap: f64, seed: u64) -> (Array1<f64>, Array1<bool>) {
        let mut rng = Rng::seed(seed);
        let abnormal = Array1::from_shape_fn(300, |i| i % 3 == 0);
        let scores = abnormal.mapv(|a| rng.random::<f64>() + if a { gap } else { 0.0 });
        (scores, abnormal)
    }

    #[test]
    fn one_experiment_is_the_plain_bootstrap() {
        let (scores, abnormal) = scores(0.3, 1);
        let experiment = Experiment {
            scores: scores.view(),
            abnormal: abnormal.view(),
        };
        let one = mean_interval(&Auroc, &[experiment], 400, 0.9, 5).unwrap();
        let plain =
            bootstrap_interval(&Auroc, scores.view(), abnormal.view(), 400, 0.9, 5).unwrap();
        assert_eq!(one.estimate, plain.estimate);
        assert!((one.low - plain.low).abs() < 0.01 && (one.high - plain.high).abs() < 0.01);
        let more = mean_interval(&Auroc, &[experiment; 4], 400, 0.9, 5).unwrap();
        let width = |i: Interval| i.high - i.low;
        // The mean of four independent experiments has half the spread.
        assert!(width(more) < 0.65 * width(one), "{more:?} {one:?}");
    }

    #[test]
    fn a_clear_difference_is_significant_and_none_is_not() {
        let (better, abnormal) = scores(0.5, 1);
        let (worse, _) = scores(0.1, 1);
        let pair = |first, second| {
            let experiment = Experiment {
                scores: first,
                abnormal: abnormal.view(),
            };
            compare(&Auroc, &[(experiment, second)], 400, 0.95, 3).unwrap()
        };
        let found = pair(better.view(), worse.view());
        let expected = auroc(better.view(), abnormal.view()).unwrap()
            - auroc(worse.view(), abnormal.view()).unwrap();
        assert!((found.difference.estimate - expected).abs() < 1e-12);
        assert!(
            found.difference.low > 0.0 && found.p_value < 0.01,
            "{found:?}"
        );
        let same = pair(better.view(), better.view());
        assert_eq!((same.p_value, same.difference.estimate), (1.0, 0.0));
        let turned = pair(worse.view(), better.view());
        assert!(turned.difference.high < 0.0 && turned.p_value < 0.01);
    }

    #[test]
    fn refuses_what_has_no_meaning() {
        let (scores, abnormal) = scores(0.3, 1);
        assert!(matches!(
            mean_interval(&Auroc, &[], 100, 0.9, 0),
            Err(Error::Empty { .. })
        ));
        let experiment = Experiment {
            scores: scores.view(),
            abnormal: abnormal.view(),
        };
        let short = scores.slice(ndarray::s![..10]);
        assert!(matches!(
            compare(&Auroc, &[(experiment, short)], 100, 0.9, 0),
            Err(Error::Length { .. })
        ));
        assert!(mean_interval(&Auroc, &[experiment], 5, 0.9, 0).is_err());
    }
}
