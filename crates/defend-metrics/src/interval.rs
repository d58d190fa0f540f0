//! Confidence interval of the AUROC by DeLong's method.

use ndarray::ArrayView1;

use crate::{Error, auroc, quantile, sweep::check};

/// An estimate with the bounds of its confidence interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    /// Lower bound.
    pub low: f64,
    /// Value on the whole sample.
    pub estimate: f64,
    /// Upper bound.
    pub high: f64,
}

/// AUROC with its confidence interval by DeLong, DeLong and Clarke-Pearson (1988).
///
/// The variance comes from mid-ranks in `O(n log n)` (Sun and Xu, 2014); the interval is taken on
/// the logit scale, so it is asymmetric and stays inside `0..=1`.
///
/// An AUROC of 1 has no logit and no variance. Its bound is exact instead: the `m` samples of the
/// smaller class form `m` independent pairs, all ordered rightly with probability `AUROC^m`, so
/// `low` is `(alpha / 2)^(1/m)` with `alpha = 1 - confidence`; an AUROC of 0 mirrors it. Scores that
/// are all equal have AUROC 0.5 and variance 0: the interval is that point.
/// # Errors
/// As [`Metric::evaluate`](crate::Metric::evaluate); [`Error::TooFew`] with fewer than 2 samples of
/// a class; [`Error::Config`] when `confidence` is not in `0 < confidence < 1`.
pub fn auroc_interval(
    scores: ArrayView1<'_, f64>,
    abnormal: ArrayView1<'_, bool>,
    confidence: f64,
) -> Result<Interval, Error> {
    quantile::check_confidence(confidence)?;
    check(scores, abnormal, 2)?;
    let estimate = auroc(scores, abnormal)?;

    let of_class = |class: bool| -> Vec<f64> {
        scores
            .iter()
            .zip(abnormal)
            .filter(|(_, a)| **a == class)
            .map(|(s, _)| *s)
            .collect()
    };
    let (novel, normal) = (of_class(true), of_class(false));

    if estimate <= 0.0 || estimate >= 1.0 {
        let pairs = novel.len().min(normal.len()) as f64;
        let bound = f64::midpoint(1.0, -confidence).powf(1.0 / pairs);
        return Ok(if estimate >= 1.0 {
            Interval {
                low: bound,
                estimate,
                high: 1.0,
            }
        } else {
            Interval {
                low: 0.0,
                estimate,
                high: 1.0 - bound,
            }
        });
    }

    let variance = variance_of_mean(&placements(&novel, &normal))
        + variance_of_mean(&placements(&normal, &novel));
    // d logit(a) / da = 1 / (a (1 - a))
    let spread = quantile::standard_normal(f64::midpoint(1.0, confidence)) * variance.sqrt()
        / (estimate * (1.0 - estimate));
    let centre = (estimate / (1.0 - estimate)).ln();
    let logistic = |x: f64| 1.0 / (1.0 + (-x).exp());
    Ok(Interval {
        // Rounding must not push a bound past an estimate whose variance is zero.
        low: logistic(centre - spread).min(estimate),
        estimate,
        high: logistic(centre + spread).max(estimate),
    })
}

/// For each of `of`, the share of `among` below it, ties counting half.
fn placements(of: &[f64], among: &[f64]) -> Vec<f64> {
    let mut sorted = among.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    of.iter()
        .map(|s| {
            let below = sorted.partition_point(|t| t < s);
            let up_to = sorted.partition_point(|t| t <= s);
            f64::midpoint(below as f64, up_to as f64) / sorted.len() as f64
        })
        .collect()
}

/// Unbiased variance of the mean of at least two values.
fn variance_of_mean(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0) / n
}

#[cfg(test)]
mod tests {
    use ndarray::{Array1, array};

    use super::*;
    use crate::Class;

    #[test]
    fn perfect_separation_has_the_exact_bound() {
        let scores = array![0.0, 1.0, 2.0, 3.0, 4.0];
        let abnormal = array![false, false, false, true, true];
        let found = auroc_interval(scores.view(), abnormal.view(), 0.95).unwrap();
        assert!((found.low - 0.025_f64.sqrt()).abs() < 1e-12);
        assert!((found.estimate - 1.0).abs() < 1e-12 && (found.high - 1.0).abs() < 1e-12);

        let mirrored = auroc_interval(scores.mapv(|s| -s).view(), abnormal.view(), 0.95).unwrap();
        assert!(mirrored.low.abs() < 1e-12 && mirrored.estimate.abs() < 1e-12);
        assert!((mirrored.high - (1.0 - found.low)).abs() < 1e-12);
    }

    #[test]
    fn constant_scores_are_a_point() {
        let found = auroc_interval(
            Array1::ones(6).view(),
            array![true, true, false, false, false, true].view(),
            0.9,
        )
        .unwrap();
        for value in [found.low, found.estimate, found.high] {
            assert!((value - 0.5).abs() < 1e-12);
        }
    }

    #[test]
    fn refuses_a_single_sample_and_a_bad_level() {
        let scores = array![0.0, 1.0, 2.0];
        let one = array![false, false, true];
        assert_eq!(
            auroc_interval(scores.view(), one.view(), 0.95).unwrap_err(),
            Error::TooFew {
                class: Class::Abnormal,
                found: 1,
                needed: 2
            }
        );
        for level in [0.0, 1.0, 95.0, f64::NAN] {
            let result = auroc_interval(scores.view(), one.view(), level);
            assert!(matches!(
                result,
                Err(Error::Config {
                    field: "confidence",
                    ..
                })
            ));
        }
    }
}
