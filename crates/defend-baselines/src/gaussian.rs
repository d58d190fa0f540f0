//! A normal distribution over features.

use nalgebra::{Cholesky, DMatrix, DVector, Dyn};

use defend_core::Error;

/// Mean and covariance of vectors, for their Mahalanobis distance.
#[derive(Debug, Clone)]
pub(crate) struct Gaussian {
    mean: DVector<f64>,
    factor: Cholesky<f64, Dyn>,
}

/// What is added to a sample's covariance, so that few vectors of many values have an inverse.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Regularization {
    /// Towards a multiple of the identity by the share that minimises the expected error (Ledoit and Wolf, 2004).
    LedoitWolf,
    /// This much on the diagonal.
    Diagonal(f64),
}

impl Gaussian {
    /// From rows of equal length.
    pub(crate) fn fit(rows: &[Vec<f32>], regularization: Regularization) -> Result<Self, Error> {
        let (n, d) = (rows.len(), rows.first().map_or(0, Vec::len));
        if n == 0 || d == 0 {
            return Err(Error::NoImages {
                tried: n,
                first: "there are no features".into(),
            });
        }
        let values = DMatrix::from_fn(n, d, |i, j| f64::from(rows[i][j]));
        let mean = values.row_mean().transpose();
        let centred = DMatrix::from_fn(n, d, |i, j| values[(i, j)] - mean[j]);
        let mut covariance = centred.tr_mul(&centred) / n as f64;
        match regularization {
            Regularization::LedoitWolf => shrink(&mut covariance, &centred),
            Regularization::Diagonal(value) => {
                for i in 0..d {
                    covariance[(i, i)] += value;
                }
            }
        }
        let factor = Cholesky::new(covariance).ok_or_else(|| Error::Config {
            field: "features",
            value: format!("{n} vectors of {d} values without an invertible covariance"),
            expected: "finite features that are not all equal".into(),
        })?;
        Ok(Self { mean, factor })
    }

    /// Squared Mahalanobis distance.
    pub(crate) fn distance(&self, row: &[f32]) -> f32 {
        let values = row
            .iter()
            .zip(&self.mean)
            .map(|(x, mean)| f64::from(*x) - mean);
        let centred = DVector::from_iterator(self.mean.len(), values);
        let whitened = self.factor.l_dirty().solve_lower_triangular(&centred);
        whitened.map_or(f32::NAN, |w| w.norm_squared() as f32)
    }
}

/// Ledoit and Wolf's shrinkage of a covariance towards the identity times its mean variance.
fn shrink(covariance: &mut DMatrix<f64>, centred: &DMatrix<f64>) {
    let (n, d) = (centred.nrows() as f64, centred.ncols());
    let mean_variance = covariance.trace() / d as f64;
    let spread = covariance.norm_squared() - d as f64 * mean_variance * mean_variance;
    // Sum over the samples of |x x^T - S|^2, with |x x^T|^2 = |x|^4.
    let fourth: f64 = centred
        .row_iter()
        .map(|row| row.norm_squared().powi(2))
        .sum();
    let noise = (fourth / n - covariance.norm_squared()) / n;
    let share = if spread > 0.0 {
        (noise / spread).clamp(0.0, 1.0)
    } else {
        1.0
    };
    // Vectors that are all equal leave a variance of rounding only.
    let floor = (share * mean_variance).max(1e-12);
    *covariance *= 1.0 - share;
    for i in 0..d {
        covariance[(i, i)] += floor;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may panic")]

    use super::*;

    #[test]
    fn distances_of_a_known_distribution() {
        // Variances 4 and 1, no correlation.
        let rows: Vec<Vec<f32>> = [[2.0, 1.0], [2.0, -1.0], [-2.0, 1.0], [-2.0, -1.0]]
            .iter()
            .map(|row| row.to_vec())
            .collect();
        let gaussian = Gaussian::fit(&rows, Regularization::Diagonal(0.0)).unwrap();
        assert!((gaussian.distance(&[4.0, 0.0]) - 4.0).abs() < 1e-6);
        assert!((gaussian.distance(&[0.0, 3.0]) - 9.0).abs() < 1e-6);
    }

    #[test]
    fn shrinkage_equals_scikit_learns() {
        // Both from tools/golden_ledoit_wolf.py.
        let rows = [
            [1.0, 2.0, 0.0],
            [0.0, 1.0, 3.0],
            [2.0, 2.0, 1.0],
            [1.0, 0.0, 1.0],
            [3.0, 1.0, 2.0],
            [4.0, 5.0, 1.0],
            [0.0, 0.0, 6.0],
        ];
        let golden = [
            [2.548_664_587_865, 0.223_346_338_341, -0.171_595_357_506],
            [0.223_346_338_341, 2.624_929_191_201, -0.190_661_508_34],
            [-0.171_595_357_506, -0.190_661_508_34, 2.744_773_567_872],
        ];
        let n = rows.len();
        let values = DMatrix::from_fn(n, 3, |i, j| rows[i][j]);
        let mean = values.row_mean();
        let centred = DMatrix::from_fn(n, 3, |i, j| values[(i, j)] - mean[j]);
        let mut covariance = centred.tr_mul(&centred) / n as f64;
        shrink(&mut covariance, &centred);
        for (i, row) in golden.iter().enumerate() {
            for (j, expected) in row.iter().enumerate() {
                assert!((covariance[(i, j)] - expected).abs() < 1e-9, "{i} {j}");
            }
        }
    }

    #[test]
    fn fewer_vectors_than_values_still_have_a_distance() {
        let rows: Vec<Vec<f32>> = (0..3)
            .map(|i| (0..8).map(|j| ((i * 8 + j) as f32 * 0.7).sin()).collect())
            .collect();
        let gaussian = Gaussian::fit(&rows, Regularization::LedoitWolf).unwrap();
        assert!(gaussian.distance(&rows[0]).is_finite());
        let equal = vec![vec![1.0; 4]; 5];
        let gaussian = Gaussian::fit(&equal, Regularization::LedoitWolf).unwrap();
        assert!(gaussian.distance(&equal[0]).abs() < 1e-9);
        assert!(Gaussian::fit(&vec![vec![f32::NAN; 2]; 3], Regularization::LedoitWolf).is_err());
        assert!(Gaussian::fit(&[], Regularization::LedoitWolf).is_err());
    }
}
