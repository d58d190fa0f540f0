//! From a tolerated rate of false alarms to a threshold.

use ndarray::ArrayView1;

use crate::{Error, Promise, sweep::finite};

/// Slack for products such as 0.29 * 100, which f64 puts just below 29.
const ROUNDING: f64 = 1e-9;

/// Share of normal images that may be called novel, strictly between 0 and 1.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct FalseAlarmRate(f64);

impl FalseAlarmRate {
    /// Wraps `rate`.
    ///
    /// # Errors
    /// [`Error::Config`] unless `0 < rate < 1`.
    pub fn new(rate: f64) -> Result<Self, Error> {
        if rate > 0.0 && rate < 1.0 {
            return Ok(Self(rate));
        }
        Err(Error::Config {
            field: "false alarm rate",
            value: rate,
            expected: "0 < rate < 1",
        })
    }

    /// The rate, in `0 < rate < 1`.
    pub fn get(self) -> f64 {
        self.0
    }

    /// Most of `n` held-out scores that may lie above the threshold for the rate to be kept on average.
    pub(crate) fn tolerated(self, n: usize) -> Result<usize, Error> {
        // k = ceil((n + 1)(1 - rate)) = (n + 1) - floor((n + 1) rate); the scores above the k-th number
        // n - k = floor((n + 1) rate) - 1.
        let tolerated = ((n + 1) as f64 * self.0 + ROUNDING).floor() as usize;
        if tolerated == 0 {
            let needed = ((1.0 - ROUNDING) / self.0).ceil() as usize - 1;
            return Err(Error::TooFewForRate {
                rate: self.0,
                found: n,
                needed,
            });
        }
        // A rate so near to 1 that all might lie above.
        Ok((tolerated - 1).min(n.saturating_sub(1)))
    }
}

/// The highest score that still counts as normal.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct Threshold(f64);

impl Threshold {
    /// Wraps a threshold that was found before, as when a detector is loaded.
    ///
    /// # Errors
    /// [`Error::Config`] when `value` is NaN or infinite.
    pub fn new(value: f64) -> Result<Self, Error> {
        if value.is_finite() {
            return Ok(Self(value));
        }
        Err(Error::Config {
            field: "threshold",
            value,
            expected: "a finite number",
        })
    }

    /// The threshold, in units of the score.
    pub fn get(self) -> f64 {
        self.0
    }

    /// Whether `score` lies above the threshold; a NaN, which nothing vouches for, is novel.
    pub fn is_novel(self, score: f64) -> bool {
        score > self.0 || score.is_nan()
    }
}

/// Threshold that keeps false alarms at a rate or below, from scores of held-out normal images.
///
/// For a [`FalseAlarmRate`], which is kept on average, it is the `k`-th smallest of the `n` scores, `k = ceil((n + 1)(1 - rate))` (split conformal
/// prediction). If the held-out and the future normal images are exchangeable, a future one exceeds
/// it with probability at most `rate`, whatever the distribution of the scores and for any `n`. This
/// bounds the *expected* rate, over draws of the held-out set too: the rate of one given threshold
/// scatters around it, as [`false_alarm_range`](crate::false_alarm_range) says. [`Promise::WithConfidence`] takes a smaller
/// `n - k`, such that the rate of this one threshold is kept with the confidence. The images must not have been trained on, else
/// either bound is void.
///
/// # Errors
/// [`Error::TooFewForConfidence`]; [`Error::TooFewForRate`] when `n < ceil(1 / rate) - 1`; [`Error::Empty`]; [`Error::NotFinite`].
pub fn threshold_for(
    normal_scores: ArrayView1<'_, f64>,
    promise: impl Into<Promise>,
) -> Result<Threshold, Error> {
    finite(normal_scores)?;
    let n = normal_scores.len();
    let k = n - promise.into().above(n)?;
    let mut scores = normal_scores.to_vec();
    let (_, kth, _) = scores.select_nth_unstable_by(k - 1, f64::total_cmp);
    Threshold::new(*kth)
}

#[cfg(test)]
mod tests {
    use ndarray::{Array1, array};
    use proptest::prelude::*;

    use super::*;

    fn rate(value: f64) -> FalseAlarmRate {
        FalseAlarmRate::new(value).unwrap()
    }

    #[test]
    fn takes_the_order_statistic() {
        // k = ceil(20 * 0.95) = 19 of 19, ceil(20 * 0.5) = 10, ceil(100 * 0.71) = 71.
        for (n, share, expected) in [
            (19, 0.05, 19.0),
            (19, 0.5, 10.0),
            (99, 0.29, 71.0),
            (100, 0.29, 72.0),
        ] {
            let scores = Array1::from_iter((1..=n).rev().map(f64::from));
            let found = threshold_for(scores.view(), rate(share)).unwrap();
            assert!(
                (found.get() - expected).abs() < 1e-12,
                "{n} {share}: {found:?}"
            );
        }
    }

    #[test]
    fn says_how_many_images_are_needed() {
        let scores = Array1::from_iter((0..18).map(f64::from));
        let error = threshold_for(scores.view(), rate(0.05)).unwrap_err();
        assert_eq!(
            error,
            Error::TooFewForRate {
                rate: 0.05,
                found: 18,
                needed: 19
            }
        );
        assert!(
            error
                .to_string()
                .contains("at least 19 held-out normal images, found 18")
        );
        assert!(matches!(
            threshold_for(scores.view(), rate(f64::MIN_POSITIVE)),
            Err(Error::TooFewForRate { .. })
        ));
    }

    #[test]
    fn the_threshold_itself_is_normal_and_nan_is_not() {
        let threshold = Threshold::new(1.0).unwrap();
        assert!(!threshold.is_novel(1.0));
        assert!(threshold.is_novel(1.0 + f64::EPSILON));
        assert!(threshold.is_novel(f64::NAN));
    }

    #[test]
    fn refuses_bad_values() {
        for value in [0.0, 1.0, -0.1, f64::NAN] {
            assert!(FalseAlarmRate::new(value).is_err());
        }
        assert!(Threshold::new(f64::INFINITY).is_err());
        assert!(matches!(
            threshold_for(array![0.0, f64::NAN].view(), rate(0.5)),
            Err(Error::NotFinite { index: 1, .. })
        ));
        assert!(matches!(
            threshold_for(array![].view(), rate(0.5)),
            Err(Error::Empty { .. })
        ));
    }

    proptest! {
        /// Leave-one-out form of the bound: of n + 1 exchangeable scores, at most a share `rate`
        /// exceeds the threshold of the other n.
        #[test]
        fn bounds_false_alarms(
            scores in prop::collection::vec(-20_i32..20, 3..40),
            share in 0.05_f64..0.9,
        ) {
            let scores: Vec<f64> = scores.into_iter().map(f64::from).collect();
            let alarms = (0..scores.len()).filter(|&i| {
                let mut others = scores.clone();
                let held = others.remove(i);
                threshold_for(ArrayView1::from(&others), rate(share))
                    .is_ok_and(|threshold| threshold.is_novel(held))
            });
            prop_assert!(alarms.count() as f64 <= share * scores.len() as f64 + 1e-6);
        }

        /// The number in the error is the smallest that works.
        #[test]
        fn the_needed_number_is_tight(share in 0.003_f64..0.99) {
            let error = threshold_for(Array1::zeros(1).view(), rate(share));
            if let Err(Error::TooFewForRate { needed, .. }) = error {
                prop_assert!(threshold_for(Array1::zeros(needed).view(), rate(share)).is_ok());
                prop_assert!(threshold_for(Array1::zeros(needed - 1).view(), rate(share)).is_err());
            }
        }
    }
}
