//! Confidence interval of any metric by resampling.

use ndarray::ArrayView1;

use crate::{Error, Experiment, Interval, Metric, mean_interval};

/// Interval of `metric` by the stratified percentile bootstrap.
///
/// Normal and abnormal samples are drawn with replacement apart from each other, so every one of
/// the `resamples` keeps the sizes of both classes; the same `seed` gives the same interval. The
/// percentile interval is biased near the ends of the metric's range and shrinks to a point under
/// perfect separation: prefer [`auroc_interval`](crate::auroc_interval) for the AUROC.
/// # Errors
/// As [`Metric::evaluate`]; [`Error::Config`] when `confidence` is not in `0 < confidence < 1` or
/// when `resamples` is below `2 / (1 - confidence)`, where a bound would be an extreme value.
pub fn bootstrap_interval(
    metric: &dyn Metric,
    scores: ArrayView1<'_, f64>,
    abnormal: ArrayView1<'_, bool>,
    resamples: usize,
    confidence: f64,
    seed: u64,
) -> Result<Interval, Error> {
    let experiment = Experiment {
        runs: vec![scores],
        abnormal,
    };
    mean_interval(metric, &[experiment], resamples, confidence, seed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Aupr, Auroc, auroc_interval};
    use defend_random::Rng;
    use ndarray::Array1;
    use rand::RngExt;

    fn overlapping() -> (Array1<f64>, Array1<bool>) {
        let mut rng = Rng::seed(7);
        let abnormal = Array1::from_shape_fn(400, |i| i % 2 == 0);
        let scores = abnormal.mapv(|a| rng.random::<f64>() + if a { 0.3 } else { 0.0 });
        (scores, abnormal)
    }

    #[test]
    fn agrees_with_delong() {
        let (scores, abnormal) = overlapping();
        let (s, a) = (scores.view(), abnormal.view());
        let drawn = bootstrap_interval(&Auroc, s, a, 2000, 0.95, 1).unwrap();
        let delong = auroc_interval(s, a, 0.95).unwrap();
        assert!(
            (drawn.low - delong.low).abs() < 0.01,
            "{drawn:?} {delong:?}"
        );
        assert!(
            (drawn.high - delong.high).abs() < 0.01,
            "{drawn:?} {delong:?}"
        );
    }

    #[test]
    fn the_seed_decides() {
        let (scores, abnormal) = overlapping();
        let run = |seed| {
            bootstrap_interval(&Aupr, scores.view(), abnormal.view(), 100, 0.9, seed).unwrap()
        };
        assert_eq!(run(3), run(3));
        assert_ne!(run(3), run(4));
    }

    #[test]
    fn refuses_too_few_resamples() {
        let (scores, abnormal) = overlapping();
        let run = |n| bootstrap_interval(&Auroc, scores.view(), abnormal.view(), n, 0.95, 0);
        assert!(matches!(
            run(39),
            Err(Error::Config {
                field: "resamples",
                ..
            })
        ));
        assert!(run(40).is_ok());
    }
}
