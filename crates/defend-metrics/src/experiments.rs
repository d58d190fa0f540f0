//! Means over the experiments of a table, such as the ten normal classes of CIFAR-10, and whether two methods differ.

use defend_random::Rng;
use ndarray::ArrayView1;
use rand::RngExt;

use crate::{Drawn, Error, Interval, Metric, quantile};

/// The scores of one method in one experiment.
#[derive(Debug, Clone)]
pub struct Experiment<'a> {
    /// Scores of each run, larger for more novel: one a seed or training sample, all on the same test images.
    pub runs: Vec<ArrayView1<'a, f64>>,
    /// The truth, `true` for novel.
    pub abnormal: ArrayView1<'a, bool>,
}

impl Experiment<'_> {
    /// Mean of the metric over the runs.
    fn mean(&self, metric: &dyn Metric) -> Result<f64, Error> {
        let mut sum = 0.0;
        for run in &self.runs {
            sum += metric.evaluate(*run, self.abnormal)?;
        }
        Ok(sum / self.runs.len() as f64)
    }

    /// The same of a sample; `orders`: of the runs.
    fn mean_of(
        &self,
        draw: &Draw,
        metric: &dyn Metric,
        orders: &[Vec<usize>],
    ) -> Result<f64, Error> {
        let mut sum = 0.0;
        for (run, order) in self.runs.iter().zip(orders) {
            sum += metric.evaluate_drawn(&Drawn {
                scores: *run,
                abnormal: self.abnormal,
                order,
                counts: &draw.counts,
            })?;
        }
        Ok(sum / self.runs.len() as f64)
    }

    fn check(&self) -> Result<(), Error> {
        if self.runs.is_empty() {
            return Err(Error::Empty { what: "runs" });
        }
        match self.runs.iter().find(|r| r.len() != self.abnormal.len()) {
            Some(run) => Err(Error::Length {
                left_name: "scores",
                left: run.len(),
                right_name: "labels",
                right: self.abnormal.len(),
            }),
            None => Ok(()),
        }
    }
}

/// How much better one method is than another on the same images.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Comparison {
    /// Mean of the metric over the experiments, first less second, with its confidence interval.
    pub difference: Interval,
    /// Two-sided p-value of no difference, `0..=1`.
    pub p_value: f64,
}

/// Mean of `metric` over experiments and their runs with its stratified percentile-bootstrap interval.
///
/// In each of the `resamples` the normal and the abnormal test images of every experiment are drawn with replacement, the
/// same for all its runs, and independently between experiments: where these share images, the interval is somewhat too
/// narrow or too wide. The runs themselves are not drawn: the interval says what other test images would change, not what
/// other training samples would.
/// # Errors
/// As [`bootstrap_interval`](crate::bootstrap_interval); [`Error::Empty`] without experiments or runs.
pub fn mean_interval(
    metric: &dyn Metric,
    experiments: &[Experiment<'_>],
    resamples: usize,
    confidence: f64,
    seed: u64,
) -> Result<Interval, Error> {
    check(resamples, confidence, experiments)?;
    let mut estimate = 0.0;
    for experiment in experiments {
        estimate += experiment.mean(metric)?;
    }
    let mut rng = Rng::seed(seed);
    let mut draws: Vec<Draw> = experiments.iter().map(|e| Draw::new(e.abnormal)).collect();
    let orders = orders(experiments);
    let mut values = Vec::with_capacity(resamples);
    for _ in 0..resamples {
        let mut sum = 0.0;
        for ((draw, experiment), orders) in draws.iter_mut().zip(experiments).zip(&orders) {
            draw.again(&mut rng);
            sum += experiment.mean_of(draw, metric, orders)?;
        }
        values.push(sum / experiments.len() as f64);
    }
    Ok(interval(
        estimate / experiments.len() as f64,
        values,
        confidence,
    ))
}

/// Compares two methods on the same experiments, in the same order; each may have runs of its own number.
///
/// The bootstrap draws the same test images for both and for all runs, so that what is hard for both cancels out. The p-value
/// is twice the smaller share of resamples on one side of zero, at least `2 / (resamples + 1)`.
/// # Errors
/// As [`mean_interval`]; [`Error::Length`] when the experiments or a pair's images differ in number.
pub fn compare(
    metric: &dyn Metric,
    first: &[Experiment<'_>],
    second: &[Experiment<'_>],
    resamples: usize,
    confidence: f64,
    seed: u64,
) -> Result<Comparison, Error> {
    check(resamples, confidence, first)?;
    check(resamples, confidence, second)?;
    let equal = |what, left, right| {
        if left == right {
            return Ok(());
        }
        Err(Error::Length {
            left_name: what,
            left,
            right_name: "those of the second",
            right,
        })
    };
    equal("experiments of the first method", first.len(), second.len())?;
    let mut estimate = 0.0;
    for (first, second) in first.iter().zip(second) {
        equal(
            "images of the first method",
            first.abnormal.len(),
            second.abnormal.len(),
        )?;
        estimate += first.mean(metric)? - second.mean(metric)?;
    }
    let count = first.len() as f64;
    let mut rng = Rng::seed(seed);
    let mut draws: Vec<Draw> = first.iter().map(|e| Draw::new(e.abnormal)).collect();
    let (of_first, of_second) = (orders(first), orders(second));
    let mut values = Vec::with_capacity(resamples);
    for _ in 0..resamples {
        let mut sum = 0.0;
        let methods = first
            .iter()
            .zip(&of_first)
            .zip(second.iter().zip(&of_second));
        for (draw, ((first, of_first), (second, of_second))) in draws.iter_mut().zip(methods) {
            draw.again(&mut rng);
            sum +=
                first.mean_of(draw, metric, of_first)? - second.mean_of(draw, metric, of_second)?;
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

fn check(resamples: usize, confidence: f64, experiments: &[Experiment<'_>]) -> Result<(), Error> {
    quantile::check_resamples(resamples, confidence)?;
    if experiments.is_empty() {
        return Err(Error::Empty {
            what: "experiments",
        });
    }
    experiments.iter().try_for_each(Experiment::check)
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

/// Stratified samples with replacement of an experiment's images, the same for all its runs.
struct Draw {
    normal: Vec<usize>,
    novel: Vec<usize>,
    counts: Vec<u32>,
}

impl Draw {
    fn new(abnormal: ArrayView1<'_, bool>) -> Self {
        let (novel, normal): (Vec<usize>, Vec<usize>) =
            (0..abnormal.len()).partition(|&i| abnormal[i]);
        Self {
            counts: vec![0; abnormal.len()],
            normal,
            novel,
        }
    }

    fn again(&mut self, rng: &mut Rng) {
        self.counts.fill(0);
        for pool in [&self.normal, &self.novel] {
            for _ in 0..pool.len() {
                self.counts[pool[rng.random_range(0..pool.len())]] += 1;
            }
        }
    }
}

/// Positions of each run's scores, lowest first: sorted once for all samples.
fn orders(experiments: &[Experiment<'_>]) -> Vec<Vec<Vec<usize>>> {
    let order = |run: &ArrayView1<'_, f64>| {
        let mut order: Vec<usize> = (0..run.len()).collect();
        order.sort_by(|&a, &b| run[a].total_cmp(&run[b]));
        order
    };
    let of = |experiment: &Experiment<'_>| experiment.runs.iter().map(order).collect();
    experiments.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Aupr, Auroc, auroc, bootstrap_interval};
    use ndarray::Array1;

    /// Normal and abnormal scores that overlap, `gap` apart.
    fn scores(gap: f64, seed: u64) -> (Array1<f64>, Array1<bool>) {
        let mut rng = Rng::seed(seed);
        let abnormal = Array1::from_shape_fn(300, |i| i % 3 == 0);
        let scores = abnormal.mapv(|a| rng.random::<f64>() + if a { gap } else { 0.0 });
        (scores, abnormal)
    }

    fn experiment<'a>(runs: &[&'a Array1<f64>], abnormal: &'a Array1<bool>) -> Experiment<'a> {
        Experiment {
            runs: runs.iter().map(|run| run.view()).collect(),
            abnormal: abnormal.view(),
        }
    }

    fn width(interval: Interval) -> f64 {
        interval.high - interval.low
    }

    #[test]
    fn one_experiment_is_the_plain_bootstrap() {
        let (scores, abnormal) = scores(0.3, 1);
        let experiment = experiment(&[&scores], &abnormal);
        let one = mean_interval(&Auroc, std::slice::from_ref(&experiment), 400, 0.9, 5).unwrap();
        let plain =
            bootstrap_interval(&Auroc, scores.view(), abnormal.view(), 400, 0.9, 5).unwrap();
        assert_eq!(one.estimate, plain.estimate);
        assert!((one.low - plain.low).abs() < 0.01 && (one.high - plain.high).abs() < 0.01);
        let more = vec![experiment; 4];
        let more = mean_interval(&Auroc, &more, 400, 0.9, 5).unwrap();
        // The mean of four independent experiments has half the spread.
        assert!(width(more) < 0.65 * width(one), "{more:?} {one:?}");
    }

    #[test]
    fn a_drawn_sample_is_judged_as_its_copies() {
        let (scores, abnormal) = scores(0.3, 1);
        // Many equal scores.
        let scores = scores.mapv(|s| (8.0 * s).round());
        let mut draw = Draw::new(abnormal.view());
        let order = orders(&[experiment(&[&scores], &abnormal)]);
        let mut rng = Rng::seed(4);
        for _ in 0..20 {
            draw.again(&mut rng);
            let sample = Drawn {
                scores: scores.view(),
                abnormal: abnormal.view(),
                order: &order[0][0],
                counts: &draw.counts,
            };
            let copies = |values: &dyn Fn(usize) -> f64| -> Array1<f64> {
                let drawn = draw.counts.iter().enumerate();
                drawn
                    .flat_map(|(i, n)| vec![values(i); *n as usize])
                    .collect()
            };
            let (drawn, truth) = (copies(&|i| scores[i]), copies(&|i| f64::from(abnormal[i])));
            let truth = truth.mapv(|t| t > 0.5);
            assert_eq!(drawn.len(), 300);
            for metric in [&Auroc as &dyn Metric, &Aupr] {
                let expected = metric.evaluate(drawn.view(), truth.view()).unwrap();
                assert_eq!(metric.evaluate_drawn(&sample).unwrap(), expected);
            }
        }
    }

    #[test]
    fn runs_on_the_same_images_are_no_new_images() {
        let (scores, abnormal) = scores(0.3, 1);
        let interval = |runs: &[&Array1<f64>]| {
            mean_interval(&Auroc, &[experiment(runs, &abnormal)], 400, 0.9, 5).unwrap()
        };
        assert_eq!(interval(&[&scores, &scores]), interval(&[&scores]));
        let other = scores.mapv(|s| -s);
        let mean = interval(&[&scores, &other]);
        assert!((mean.estimate - 0.5).abs() < 1e-12, "{mean:?}");
        assert!(width(mean) < 1e-9, "{mean:?}");
    }

    #[test]
    fn a_clear_difference_is_significant_and_none_is_not() {
        let (better, abnormal) = scores(0.5, 1);
        let (worse, _) = scores(0.1, 1);
        let pair = |first: &[&Array1<f64>], second: &[&Array1<f64>]| {
            let [first, second] = [first, second].map(|runs| [experiment(runs, &abnormal)]);
            compare(&Auroc, &first, &second, 400, 0.95, 3).unwrap()
        };
        let found = pair(&[&better], &[&worse]);
        let expected = auroc(better.view(), abnormal.view()).unwrap()
            - auroc(worse.view(), abnormal.view()).unwrap();
        assert!((found.difference.estimate - expected).abs() < 1e-12);
        assert!(
            found.difference.low > 0.0 && found.p_value < 0.01,
            "{found:?}"
        );
        let same = pair(&[&better], &[&better]);
        assert_eq!((same.p_value, same.difference.estimate), (1.0, 0.0));
        let turned = pair(&[&worse], &[&better]);
        assert!(turned.difference.high < 0.0 && turned.p_value < 0.01);
        // Of two runs one is as the other method: half the difference.
        let half = pair(&[&better, &worse], &[&worse]);
        assert!((2.0 * half.difference.estimate - expected).abs() < 1e-12);
    }

    #[test]
    fn refuses_what_has_no_meaning() {
        let (scores, abnormal) = scores(0.3, 1);
        let empty = |result: Result<Interval, Error>| matches!(result, Err(Error::Empty { .. }));
        assert!(empty(mean_interval(&Auroc, &[], 100, 0.9, 0)));
        let none = [experiment(&[], &abnormal)];
        assert!(empty(mean_interval(&Auroc, &none, 100, 0.9, 0)));
        let whole = [experiment(&[&scores], &abnormal)];
        assert!(mean_interval(&Auroc, &whole, 5, 0.9, 0).is_err());
        let short = scores.slice(ndarray::s![..10]).to_owned();
        let few = abnormal.slice(ndarray::s![..10]).to_owned();
        for second in [
            experiment(&[&short], &abnormal),
            experiment(&[&short], &few),
        ] {
            let found = compare(&Auroc, &whole, &[second], 100, 0.9, 0);
            assert!(matches!(found, Err(Error::Length { .. })), "{found:?}");
        }
    }
}
