//! Figures that need no threshold: AUROC, average precision, FPR at a TPR and the best F1.

use ndarray::{Array1, ArrayView1};

use crate::{Error, sweep::Sweep};

/// A figure of merit of novelty scores.
///
/// ```
/// use defend_metrics::{Error, Metric};
/// use ndarray::{ArrayView1, array};
///
/// /// Share of the images whose score is on the right side of 0.5.
/// struct Accuracy;
///
/// impl Metric for Accuracy {
///     fn name(&self) -> &str {
///         "accuracy"
///     }
///
///     fn evaluate(&self, scores: ArrayView1<'_, f64>, abnormal: ArrayView1<'_, bool>) -> Result<f64, Error> {
///         let right = scores.iter().zip(&abnormal).filter(|(score, abnormal)| (**score > 0.5) == **abnormal);
///         Ok(right.count() as f64 / scores.len() as f64)
///     }
/// }
///
/// let (scores, abnormal) = (array![0.1, 0.9, 0.7, 0.2], array![false, true, false, false]);
/// assert_eq!(Accuracy.evaluate(scores.view(), abnormal.view())?, 0.75);
/// # Ok::<(), Error>(())
/// ```
pub trait Metric {
    /// Name as it stands in the head of a table.
    fn name(&self) -> &str;

    /// Judges `scores` (higher is more novel) by the truth in `abnormal` (true is novel).
    ///
    /// # Errors
    /// [`Error::Length`], [`Error::Empty`], [`Error::NotFinite`], [`Error::TooFew`] when one class
    /// is absent, [`Error::Config`] for a setting of the metric out of its range.
    fn evaluate(
        &self,
        scores: ArrayView1<'_, f64>,
        abnormal: ArrayView1<'_, bool>,
    ) -> Result<f64, Error>;

    /// The same of a sample with replacement, for the bootstrap: what [`Metric::evaluate`] says of the drawn scores. Metrics that
    /// can do without sorting them again say so here.
    ///
    /// # Errors
    /// As [`Metric::evaluate`].
    fn evaluate_drawn(&self, sample: &Drawn<'_>) -> Result<f64, Error> {
        let drawn: Vec<usize> = sample
            .counts
            .iter()
            .enumerate()
            .flat_map(|(i, count)| std::iter::repeat_n(i, *count as usize))
            .collect();
        let scores: Array1<f64> = drawn.iter().map(|&i| sample.scores[i]).collect();
        let abnormal: Array1<bool> = drawn.iter().map(|&i| sample.abnormal[i]).collect();
        self.evaluate(scores.view(), abnormal.view())
    }
}

/// A sample with replacement.
#[derive(Debug, Clone, Copy)]
pub struct Drawn<'a> {
    /// All scores.
    pub scores: ArrayView1<'a, f64>,
    /// The truth of all.
    pub abnormal: ArrayView1<'a, bool>,
    /// Positions of all, lowest score first.
    pub order: &'a [usize],
    /// How often each was drawn.
    pub counts: &'a [u32],
}

/// Area under the ROC curve, see [`auroc`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Auroc;

/// Average precision, see [`average_precision`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Aupr;

/// False positive rate at a true positive rate, see [`fpr_at_tpr`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FprAtTpr {
    /// True positive rate to reach, in `0 < tpr <= 1`; 0.95 by custom.
    pub tpr: f64,
}

/// Best F1 over all thresholds, see [`f1_max`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct F1Max;

impl Default for FprAtTpr {
    fn default() -> Self {
        Self { tpr: 0.95 }
    }
}

impl Metric for Auroc {
    fn name(&self) -> &'static str {
        "AUROC"
    }

    fn evaluate(
        &self,
        scores: ArrayView1<'_, f64>,
        abnormal: ArrayView1<'_, bool>,
    ) -> Result<f64, Error> {
        auroc(scores, abnormal)
    }

    fn evaluate_drawn(&self, sample: &Drawn<'_>) -> Result<f64, Error> {
        let Drawn {
            scores,
            abnormal,
            order,
            counts,
        } = *sample;
        // Twice the number of ordered pairs, as in `auroc`, from the lowest score on.
        let (mut doubled, mut normal, mut novel) = (0u128, 0u64, 0u64);
        for equal in order.chunk_by(|a, b| scores[*a] == scores[*b]) {
            let (mut more_normal, mut more_novel) = (0u64, 0u64);
            for &i in equal {
                let count = u64::from(counts[i]);
                if abnormal[i] {
                    more_novel += count;
                } else {
                    more_normal += count;
                }
            }
            doubled += u128::from(more_novel) * u128::from(2 * normal + more_normal);
            normal += more_normal;
            novel += more_novel;
        }
        if normal == 0 || novel == 0 {
            // Which class is absent is for the general way to say.
            return auroc(scores, abnormal);
        }
        Ok(doubled as f64 / (2.0 * normal as f64 * novel as f64))
    }
}

impl Metric for Aupr {
    fn name(&self) -> &'static str {
        "AUPR"
    }

    fn evaluate(
        &self,
        scores: ArrayView1<'_, f64>,
        abnormal: ArrayView1<'_, bool>,
    ) -> Result<f64, Error> {
        average_precision(scores, abnormal)
    }
}

impl Metric for FprAtTpr {
    fn name(&self) -> &'static str {
        "FPR@TPR"
    }

    fn evaluate(
        &self,
        scores: ArrayView1<'_, f64>,
        abnormal: ArrayView1<'_, bool>,
    ) -> Result<f64, Error> {
        fpr_at_tpr(scores, abnormal, self.tpr)
    }
}

impl Metric for F1Max {
    fn name(&self) -> &'static str {
        "F1-max"
    }

    fn evaluate(
        &self,
        scores: ArrayView1<'_, f64>,
        abnormal: ArrayView1<'_, bool>,
    ) -> Result<f64, Error> {
        f1_max(scores, abnormal)
    }
}

/// Probability that an abnormal sample scores above a normal one, a tie counting half.
///
/// Equals the area under the ROC curve and the normalised Mann-Whitney U; `O(n log n)`.
/// # Errors
/// As [`Metric::evaluate`].
pub fn auroc(scores: ArrayView1<'_, f64>, abnormal: ArrayView1<'_, bool>) -> Result<f64, Error> {
    let sweep = Sweep::new(scores, abnormal)?;
    // Twice the number of ordered pairs stays an integer: exact where a sum of f64 would drift.
    let mut doubled: u128 = 0;
    let (mut false_alarms, mut hits) = (0, 0);
    for step in &sweep.steps {
        doubled += (step.false_alarms - false_alarms) as u128 * (step.hits + hits) as u128;
        (false_alarms, hits) = (step.false_alarms, step.hits);
    }
    Ok(doubled as f64 / (2.0 * sweep.normal as f64 * sweep.abnormal as f64))
}

/// Average precision: the sum of `(R_i - R_(i-1)) P_i` over the distinct scores, highest first.
///
/// The step-wise area under the precision-recall curve as scikit-learn's `average_precision_score`
/// has it; equal scores enter together, and nothing is interpolated.
/// # Errors
/// As [`Metric::evaluate`].
pub fn average_precision(
    scores: ArrayView1<'_, f64>,
    abnormal: ArrayView1<'_, bool>,
) -> Result<f64, Error> {
    let sweep = Sweep::new(scores, abnormal)?;
    let mut hits = 0;
    let mut area = 0.0;
    for step in &sweep.steps {
        let precision = step.hits as f64 / (step.hits + step.false_alarms) as f64;
        area += (step.hits - hits) as f64 * precision;
        hits = step.hits;
    }
    Ok(area / sweep.abnormal as f64)
}

/// Smallest false positive rate of any threshold whose true positive rate is at least `tpr`.
///
/// The thresholds are the scores themselves, a sample counting as novel when it scores at least the
/// threshold; no interpolation between two of them.
/// # Errors
/// As [`Metric::evaluate`]; [`Error::Config`] when `tpr` is not in `0 < tpr <= 1`.
pub fn fpr_at_tpr(
    scores: ArrayView1<'_, f64>,
    abnormal: ArrayView1<'_, bool>,
    tpr: f64,
) -> Result<f64, Error> {
    if !(tpr > 0.0 && tpr <= 1.0) {
        return Err(Error::Config {
            field: "tpr",
            value: tpr,
            expected: "0 < tpr <= 1",
        });
    }
    let sweep = Sweep::new(scores, abnormal)?;
    // Both rates only rise along the sweep, so the first step that reaches `tpr` is the best one;
    // the last step has a rate of 1 and always does.
    let reached = sweep.steps.iter().find(|step| sweep.hit_rate(step) >= tpr);
    Ok(reached.map_or(1.0, |step| sweep.false_alarm_rate(step)))
}

/// Largest F1 of the abnormal class over all thresholds.
///
/// The threshold is chosen with the labels in hand: an upper bound, not what a deployed detector
/// reaches.
/// # Errors
/// As [`Metric::evaluate`].
pub fn f1_max(scores: ArrayView1<'_, f64>, abnormal: ArrayView1<'_, bool>) -> Result<f64, Error> {
    let sweep = Sweep::new(scores, abnormal)?;
    let f1 = |hits: usize, raised: usize| 2.0 * hits as f64 / (sweep.abnormal + raised) as f64;
    Ok(sweep
        .steps
        .iter()
        .map(|step| f1(step.hits, step.hits + step.false_alarms))
        .fold(0.0, f64::max))
}

#[cfg(test)]
mod tests {
    use ndarray::{Array1, array};
    use proptest::prelude::*;

    use super::*;
    use crate::Class;

    fn samples() -> impl Strategy<Value = (Array1<f64>, Array1<bool>)> {
        // Few distinct values, so that most cases hold ties.
        prop::collection::vec((-8_i32..8, any::<bool>()), 2..60)
            .prop_filter("both classes", |v| {
                v.iter().any(|s| s.1) && v.iter().any(|s| !s.1)
            })
            .prop_map(|v| {
                v.into_iter()
                    .map(|(s, a)| (f64::from(s) / 4.0, a))
                    .unzip::<_, _, Vec<_>, Vec<_>>()
            })
            .prop_map(|(s, a)| (s.into(), a.into()))
    }

    /// The definition itself, over all pairs.
    fn auroc_by_pairs(scores: &Array1<f64>, abnormal: &Array1<bool>) -> f64 {
        let (mut credit, mut pairs) = (0.0, 0.0);
        for (s, _) in scores.iter().zip(abnormal).filter(|(_, a)| **a) {
            for (t, _) in scores.iter().zip(abnormal).filter(|(_, a)| !**a) {
                pairs += 1.0;
                credit += if s > t {
                    1.0
                } else if s < t {
                    0.0
                } else {
                    0.5
                };
            }
        }
        credit / pairs
    }

    proptest! {
        #[test]
        fn auroc_is_its_definition((scores, abnormal) in samples()) {
            let found = auroc(scores.view(), abnormal.view()).unwrap();
            prop_assert!((found - auroc_by_pairs(&scores, &abnormal)).abs() < 1e-12);
        }

        #[test]
        fn monotone_maps_change_nothing((scores, abnormal) in samples()) {
            let mapped = scores.mapv(|s| (3.0 * s).exp() - 7.0);
            let metrics: [&dyn Metric; 4] = [&Auroc, &Aupr, &FprAtTpr::default(), &F1Max];
            for metric in metrics {
                prop_assert_eq!(
                    metric.evaluate(scores.view(), abnormal.view()).unwrap(),
                    metric.evaluate(mapped.view(), abnormal.view()).unwrap()
                );
            }
        }

        #[test]
        fn flipped_labels_or_scores_turn_auroc_over((scores, abnormal) in samples()) {
            let straight = auroc(scores.view(), abnormal.view()).unwrap();
            let labels = auroc(scores.view(), abnormal.mapv(|a| !a).view()).unwrap();
            let negated = auroc(scores.mapv(|s| -s).view(), abnormal.view()).unwrap();
            prop_assert!((straight + labels - 1.0).abs() < 1e-12);
            prop_assert!((straight + negated - 1.0).abs() < 1e-12);
        }

        #[test]
        fn every_figure_lies_between_zero_and_one((scores, abnormal) in samples()) {
            let metrics: [&dyn Metric; 4] = [&Auroc, &Aupr, &FprAtTpr::default(), &F1Max];
            for metric in metrics {
                let value = metric.evaluate(scores.view(), abnormal.view()).unwrap();
                prop_assert!((0.0..=1.0).contains(&value), "{} = {value}", metric.name());
            }
        }
    }

    #[test]
    fn hand_computed() {
        let scores = array![0.9, 0.8, 0.7, 0.6, 0.5];
        let abnormal = array![true, false, true, false, true];
        let (s, a) = (scores.view(), abnormal.view());
        // Pairs won: 0.9 beats two, 0.7 beats one, 0.5 none: 3 of 6.
        assert!((auroc(s, a).unwrap() - 0.5).abs() < 1e-12);
        // (1/1 + 2/3 + 3/5) / 3.
        assert!((average_precision(s, a).unwrap() - 34.0 / 45.0).abs() < 1e-12);
        // Two thirds are reached at 0.7 with one false alarm of two, everything only at 0.5.
        assert!((fpr_at_tpr(s, a, 2.0 / 3.0).unwrap() - 0.5).abs() < 1e-12);
        assert!((fpr_at_tpr(s, a, 0.95).unwrap() - 1.0).abs() < 1e-12);
        // At 0.5: 2 * 3 / (3 + 5).
        assert!((f1_max(s, a).unwrap() - 0.75).abs() < 1e-12);
    }

    #[test]
    fn nineteen_of_twenty_reach_95_percent() {
        // 19/20 and the literal 0.95 are the same f64; 0.95 * 20 need not be 19.
        let scores = Array1::from_iter((0..40).map(f64::from));
        let abnormal = Array1::from_iter((0..40).map(|i| i >= 20 || i == 0));
        let abnormal = {
            let mut a = abnormal;
            a[39] = false;
            a
        };
        assert_eq!(abnormal.iter().filter(|&&a| a).count(), 20);
        let fpr = fpr_at_tpr(scores.view(), abnormal.view(), 0.95).unwrap();
        assert!((fpr - 1.0 / 20.0).abs() < 1e-12);
    }

    #[test]
    fn a_constant_score_knows_nothing() {
        let scores = array![1.0, 1.0, 1.0, 1.0];
        let abnormal = array![true, false, false, false];
        let (s, a) = (scores.view(), abnormal.view());
        assert!((auroc(s, a).unwrap() - 0.5).abs() < 1e-12);
        assert!((average_precision(s, a).unwrap() - 0.25).abs() < 1e-12);
        assert!((fpr_at_tpr(s, a, 0.95).unwrap() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn zero_has_one_sign() {
        let found = auroc(array![0.0, -0.0].view(), array![true, false].view()).unwrap();
        assert!((found - 0.5).abs() < 1e-12);
    }

    #[test]
    fn refuses_what_has_no_answer() {
        let fails =
            |s: &[f64], a: &[bool]| auroc(ArrayView1::from(s), ArrayView1::from(a)).unwrap_err();
        assert_eq!(fails(&[], &[]), Error::Empty { what: "scores" });
        assert!(matches!(
            fails(&[1.0], &[true, false]),
            Error::Length {
                left: 1,
                right: 2,
                ..
            }
        ));
        assert_eq!(
            fails(&[1.0, 2.0], &[true, true]),
            Error::TooFew {
                class: Class::Normal,
                found: 0,
                needed: 1
            }
        );
        assert_eq!(
            fails(&[1.0, 2.0], &[false, false]).to_string(),
            "the labels hold 0 abnormal samples, expected at least 1"
        );
        assert!(matches!(
            fails(&[1.0, f64::NAN], &[true, false]),
            Error::NotFinite { index: 1, .. }
        ));
        assert!(matches!(
            fails(&[f64::INFINITY, 0.0], &[true, false]),
            Error::NotFinite { index: 0, .. }
        ));
        for tpr in [0.0, 1.1, f64::NAN] {
            let metric = FprAtTpr { tpr };
            let result = metric.evaluate(array![1.0, 2.0].view(), array![true, false].view());
            assert!(matches!(result, Err(Error::Config { field: "tpr", .. })));
        }
    }
}
