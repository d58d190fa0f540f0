//! What held-out normal scores promise: p-values, ranges of the false alarm rate, and batches with few false discoveries.

use statrs::distribution::{Beta, ContinuousCDF};

use crate::quantile::check_confidence;
use crate::{Error, FalseAlarmRate};

/// What a threshold keeps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Promise {
    /// On average over calibrations, at most this share of normal images is called novel. A single calibration scatters around it:
    /// [`false_alarm_range`].
    OnAverage(FalseAlarmRate),
    /// With a confidence, the share is at most this, for the calibration at hand.
    WithConfidence {
        /// The share.
        rate: FalseAlarmRate,
        /// Share of calibrations that keep it, in `0 < confidence < 1`.
        confidence: f64,
    },
}

impl From<FalseAlarmRate> for Promise {
    fn from(rate: FalseAlarmRate) -> Self {
        Self::OnAverage(rate)
    }
}

impl Promise {
    /// The share of normal images that may be called novel.
    pub fn rate(self) -> FalseAlarmRate {
        match self {
            Self::OnAverage(rate) | Self::WithConfidence { rate, .. } => rate,
        }
    }

    /// Most of `n` held-out scores that may lie above the threshold.
    ///
    /// # Errors
    /// [`Error::TooFewForRate`], [`Error::TooFewForConfidence`] with the number that is needed; [`Error::Config`] for a confidence
    /// out of range.
    pub(crate) fn above(self, n: usize) -> Result<usize, Error> {
        match self {
            Self::OnAverage(rate) => rate.tolerated(n),
            Self::WithConfidence { rate, confidence } => {
                check_confidence(confidence)?;
                let kept = |above: usize| held(n, above, rate.get()) >= confidence;
                if n == 0 || !kept(0) {
                    let needed = ((1.0 - confidence).ln() / (-rate.get()).ln_1p()).ceil();
                    return Err(Error::TooFewForConfidence {
                        rate: rate.get(),
                        confidence,
                        found: n,
                        needed: needed as usize,
                    });
                }
                // The more scores lie above, the less is held: bisection for the last number that is.
                let (mut fewest, mut most) = (0, n - 1);
                while fewest < most {
                    let middle = (fewest + most).div_ceil(2);
                    if kept(middle) {
                        fewest = middle;
                    } else {
                        most = middle - 1;
                    }
                }
                Ok(fewest)
            }
        }
    }
}

/// Probability that the false alarm rate of a threshold with `above` of `n` held-out scores above it is at most `rate`: the rate is
/// distributed as Beta(above + 1, n - above), whatever the scores' distribution.
fn held(n: usize, above: usize, rate: f64) -> f64 {
    Beta::new((above + 1) as f64, (n - above) as f64).map_or(0.0, |rates| rates.cdf(rate))
}

/// Range that the false alarm rate of a threshold lies in with `confidence` (0.95: from the 2.5th to the 97.5th percentile of
/// Beta(above + 1, n - above)): `above` of `n` held-out normal scores lie above it.
///
/// # Errors
/// [`Error::Config`] for a confidence out of range, and for no scores or none at or below the threshold.
pub fn false_alarm_range(n: usize, above: usize, confidence: f64) -> Result<[f64; 2], Error> {
    check_confidence(confidence)?;
    let rates = (above < n)
        .then(|| Beta::new((above + 1) as f64, (n - above) as f64).ok())
        .flatten()
        .ok_or(Error::Config {
            field: "scores above the threshold",
            value: above as f64,
            expected: "fewer than there are scores",
        })?;
    let tail = (1.0 - confidence) / 2.0;
    Ok([rates.inverse_cdf(tail), rates.inverse_cdf(1.0 - tail)])
}

/// Conformal p-value: the share of normal images whose score would be at least as large, the image itself counted,
/// `(1 + #{held-out scores >= score}) / (n + 1)`.
///
/// Of exchangeable normal images no more than a share `p` has a p-value of `p` or less. `ascending`: the held-out normal scores in
/// ascending order. A NaN, which nothing vouches for, gets the smallest p-value there is.
pub fn p_value(ascending: &[f64], score: f64) -> f64 {
    let below = if score.is_nan() {
        ascending.len()
    } else {
        ascending.partition_point(|held_out| *held_out < score)
    };
    (1 + ascending.len() - below) as f64 / (ascending.len() + 1) as f64
}

/// Which images of a batch to call novel such that, on average, at most a share `rate` of those that are called so is normal
/// (Benjamini and Hochberg; it holds for p-values from one set of held-out scores: Bates et al. 2023).
///
/// `p_values`: one for each image; the answer is in their order.
pub fn benjamini_hochberg(p_values: &[f64], rate: FalseAlarmRate) -> Vec<bool> {
    let mut ascending = p_values.to_vec();
    ascending.sort_by(f64::total_cmp);
    let n = p_values.len() as f64;
    let within = |(rank, p): (usize, &f64)| *p <= rate.get() * (rank + 1) as f64 / n;
    let last = ascending.iter().enumerate().rposition(within);
    let limit = last.and_then(|rank| ascending.get(rank));
    let novel = |p: &f64| limit.is_some_and(|limit| p <= limit);
    p_values.iter().map(novel).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threshold_for;
    use defend_random::Rng;
    use ndarray::ArrayView1;
    use rand::RngExt;

    fn rate(value: f64) -> FalseAlarmRate {
        FalseAlarmRate::new(value).unwrap()
    }

    fn normal_scores(n: usize, rng: &mut Rng) -> Vec<f64> {
        (0..n).map(|_| rng.random_range(0.0..1.0)).collect()
    }

    #[test]
    fn p_values_count_what_is_as_large() {
        let held_out = [1.0, 2.0, 2.0, 3.0];
        for (score, expected) in [
            (0.0, 1.0),
            (1.0, 1.0),
            (2.0, 0.8),
            (2.5, 0.4),
            (3.0, 0.4),
            (4.0, 0.2),
        ] {
            assert_eq!(p_value(&held_out, score), expected, "{score}");
        }
        assert_eq!(p_value(&held_out, f64::NAN), 0.2);
        assert_eq!(p_value(&[], 1.0), 1.0);
    }

    const RANGES: [(usize, usize, [f64; 2]); 4] = [
        (19, 0, [0.001_331_628_804_18, 0.176_466_911_807]),
        (120, 11, [0.052_747_786_390_1, 0.158_098_541_196]),
        (200, 9, [0.024_234_165_472_1, 0.083_702_688_075_9]),
        (2000, 99, [0.040_864_267_718_3, 0.059_937_316_158_4]),
    ];

    /// `scipy.stats.beta.ppf([0.025, 0.975], above + 1, n - above)`.
    #[test]
    fn ranges_are_scipys_beta_quantiles() {
        for (n, above, expected) in RANGES {
            let found = false_alarm_range(n, above, 0.95).unwrap();
            for (found, expected) in found.iter().zip(expected) {
                assert!(
                    (found - expected).abs() < 1e-9,
                    "{n} {above}: {found} {expected}"
                );
            }
        }
        assert!(false_alarm_range(5, 5, 0.95).is_err());
        assert!(false_alarm_range(5, 1, 1.0).is_err());
    }

    #[test]
    fn confidence_needs_more_images_and_says_how_many() {
        // 0.95 ^ 59 < 0.05 <= 0.95 ^ 58.
        let promise = Promise::WithConfidence {
            rate: rate(0.05),
            confidence: 0.95,
        };
        assert_eq!(promise.above(59), Ok(0));
        let error = promise.above(58).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("at least 59 held-out normal images, found 58"),
            "{error}"
        );
        // Wilks: 93 images allow one above.
        assert_eq!((promise.above(92), promise.above(93)), (Ok(0), Ok(1)));
        let careless = Promise::WithConfidence {
            rate: rate(0.05),
            confidence: 1.5,
        };
        assert!(matches!(
            careless.above(100),
            Err(Error::Config {
                field: "confidence",
                ..
            })
        ));
    }

    /// A thousand calibrations: the rate is kept on average, lies in the range as often as it says, and is kept by as many
    /// calibrations as the confidence says.
    #[test]
    fn promises_are_kept_over_a_thousand_resamplings() {
        let rng = &mut Rng::seed(11);
        let (draws, n, wanted) = (1000, 120, 0.1);
        let confident = Promise::WithConfidence {
            rate: rate(wanted),
            confidence: 0.9,
        };
        let (mut sum, mut in_range, mut kept) = (0.0, 0, 0);
        for _ in 0..draws {
            let scores = normal_scores(n, rng);
            let view = ArrayView1::from(&scores);
            // Of scores that are even between 0 and 1, the rate of a threshold is what lies above it.
            let average = 1.0 - threshold_for(view, rate(wanted)).unwrap().get();
            sum += average;
            let above = Promise::from(rate(wanted)).above(n).unwrap();
            let [low, high] = false_alarm_range(n, above, 0.95).unwrap();
            in_range += usize::from((low..=high).contains(&average));
            kept += usize::from(1.0 - threshold_for(view, confident).unwrap().get() <= wanted);
        }
        // Three standard errors: of the mean .026 / 1000 ^ .5, of the shares (p (1 - p) / 1000) ^ .5.
        let mean = sum / f64::from(draws);
        assert!(mean <= wanted + 0.0025 && mean > wanted - 0.012, "{mean}");
        assert!((929..=971).contains(&in_range), "{in_range}");
        assert!(kept >= 900 - 28, "{kept}");
        // Not by being useless: the next score would not keep it.
        assert!(kept < 980, "{kept}");
    }

    #[test]
    fn false_discoveries_are_kept_over_a_thousand_resamplings() {
        let rng = &mut Rng::seed(12);
        let (draws, wanted) = (1000, 0.2);
        let (mut shares, mut power) = (0.0, 0.0);
        for _ in 0..draws {
            let mut held_out = normal_scores(200, rng);
            held_out.sort_by(f64::total_cmp);
            // 80 normal images, and 20 of which most score higher than any normal one.
            let batch: Vec<f64> = normal_scores(80, rng)
                .into_iter()
                .chain((0..20).map(|_| rng.random_range(0.9..1.5)))
                .collect();
            let p: Vec<f64> = batch.iter().map(|s| p_value(&held_out, *s)).collect();
            let novel = benjamini_hochberg(&p, rate(wanted));
            let called = novel.iter().filter(|n| **n).count();
            let wrong = novel[..80].iter().filter(|n| **n).count();
            shares += wrong as f64 / called.max(1) as f64;
            power += (called - wrong) as f64 / 20.0;
        }
        let (share, power) = (shares / f64::from(draws), power / f64::from(draws));
        assert!(share <= wanted && power > 0.7, "{share} {power}");
        assert!(benjamini_hochberg(&[], rate(0.1)).is_empty());
        assert_eq!(
            benjamini_hochberg(&[0.04, 0.5, 0.01, 0.03], rate(0.08)),
            [true, false, true, true]
        );
        assert_eq!(benjamini_hochberg(&[0.9, 0.5], rate(0.1)), [false, false]);
    }
}
