//! The receiver operating characteristic.

use ndarray::ArrayView1;

use crate::{Error, sweep::Sweep};

/// One operating point.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RocPoint {
    /// Share of the normal samples that score at least `threshold`, in `0..=1`.
    pub fpr: f64,
    /// Share of the abnormal samples that score at least `threshold`, in `0..=1`.
    pub tpr: f64,
    /// The score of this point; infinite for the first.
    pub threshold: f64,
}

/// True against false positive rate over all thresholds.
///
/// Here a sample counts as novel when it scores *at least* the threshold (scikit-learn's
/// convention), whereas [`Threshold`](crate::Threshold) asks for *more*.
#[derive(Debug, Clone, PartialEq)]
pub struct RocCurve {
    points: Vec<RocPoint>,
}

impl RocCurve {
    /// Traces the curve of `scores` with `abnormal` as the positive class.
    ///
    /// # Errors
    /// As [`Metric::evaluate`](crate::Metric::evaluate).
    pub fn new(scores: ArrayView1<'_, f64>, abnormal: ArrayView1<'_, bool>) -> Result<Self, Error> {
        let sweep = Sweep::new(scores, abnormal)?;
        let origin = RocPoint {
            fpr: 0.0,
            tpr: 0.0,
            threshold: f64::INFINITY,
        };
        let points = std::iter::once(origin)
            .chain(sweep.steps.iter().map(|step| RocPoint {
                fpr: sweep.false_alarm_rate(step),
                tpr: sweep.hit_rate(step),
                threshold: step.threshold,
            }))
            .collect();
        Ok(Self { points })
    }

    /// Points from `(0, 0)` to `(1, 1)`, one for each distinct score after the first.
    pub fn points(&self) -> &[RocPoint] {
        &self.points
    }

    /// Area under the curve by trapezoids: [`auroc`](crate::auroc) up to rounding.
    pub fn area(&self) -> f64 {
        self.points
            .windows(2)
            .map(|p| (p[1].fpr - p[0].fpr) * f64::midpoint(p[0].tpr, p[1].tpr))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn ties_make_one_slanted_edge() {
        let curve = RocCurve::new(
            array![2.0, 1.0, 1.0, 0.0].view(),
            array![true, true, false, false].view(),
        )
        .unwrap();
        let points: Vec<_> = curve
            .points()
            .iter()
            .map(|p| (p.fpr, p.tpr, p.threshold))
            .collect();
        assert_eq!(
            points,
            [
                (0.0, 0.0, f64::INFINITY),
                (0.0, 0.5, 2.0),
                (0.5, 1.0, 1.0),
                (1.0, 1.0, 0.0)
            ]
        );
        assert!((curve.area() - 0.875).abs() < 1e-12);
    }
}
