//! A normal distribution over features.

use nalgebra::{Cholesky, DMatrix, DVector, Dyn};

use defend_core::Error;

/// Mean and covariance of vectors, for their Mahalanobis distance.
#[derive(Debug, Clone)]
pub(crate) struct Gaussian {
    mean: DVector<f64>,
    factor: Cholesky<f64, Dyn>,
}

/// Sums over vectors that come one after the other, for distributions of more vectors than memory holds.
#[derive(Debug, Clone)]
pub(crate) struct Moments {
    count: usize,
    /// The first vector: sums are of differences to it, which lose no digits to a mean far from zero.
    origin: DVector<f64>,
    sum: DVector<f64>,
    products: DMatrix<f64>,
}

impl Moments {
    /// Of one vector.
    pub(crate) fn new(first: &[f32]) -> Self {
        let width = first.len();
        Self {
            count: 1,
            origin: DVector::from_iterator(width, first.iter().map(|x| f64::from(*x))),
            sum: DVector::zeros(width),
            products: DMatrix::zeros(width, width),
        }
    }

    /// One more vector of the same length.
    pub(crate) fn add(&mut self, row: &[f32]) {
        let values = row.iter().zip(&self.origin);
        let values = values.map(|(x, origin)| f64::from(*x) - origin);
        let shifted = DVector::from_iterator(self.origin.len(), values);
        self.count += 1;
        self.sum += &shifted;
        self.products.ger(1.0, &shifted, &shifted, 1.0);
    }

    /// With `regularization` added to the diagonal of the covariance.
    pub(crate) fn gaussian(&self, regularization: f64) -> Result<Gaussian, Error> {
        let n = self.count as f64;
        let shift = &self.sum / n;
        let mut covariance = &self.products / n - &shift * shift.transpose();
        for i in 0..shift.len() {
            covariance[(i, i)] += regularization;
        }
        Gaussian::new(&self.origin + shift, covariance, self.count)
    }
}

impl Gaussian {
    /// From rows of equal length; the covariance is drawn towards a multiple of the identity by the share that
    /// minimises the expected error (Ledoit and Wolf, 2004), so that few vectors of many values have an inverse.
    pub(crate) fn fit(rows: &[Vec<f32>]) -> Result<Self, Error> {
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
        shrink(&mut covariance, &centred);
        Self::new(mean, covariance, n)
    }

    fn new(mean: DVector<f64>, covariance: DMatrix<f64>, count: usize) -> Result<Self, Error> {
        let factor = Cholesky::new(covariance).ok_or_else(|| Error::Config {
            field: "features",
            value: format!(
                "{count} vectors of {} values without an invertible covariance",
                mean.len()
            ),
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
        // Variances 4 and 1 about a mean far from zero, no correlation.
        let rows = [[2.0, 1.0], [2.0, -1.0], [-2.0, 1.0], [-2.0, -1.0]];
        let far = |row: [f32; 2]| row.map(|x| x + 1000.0);
        let mut moments = Moments::new(&far(rows[0]));
        for row in &rows[1..] {
            moments.add(&far(*row));
        }
        let gaussian = moments.gaussian(0.0).unwrap();
        assert!((gaussian.distance(&far([4.0, 0.0])) - 4.0).abs() < 1e-6);
        assert!((gaussian.distance(&far([0.0, 3.0])) - 9.0).abs() < 1e-6);
        let wider = moments.gaussian(5.0).unwrap();
        assert!((wider.distance(&far([3.0, 0.0])) - 1.0).abs() < 1e-6);
        assert!(Moments::new(&[1.0, 2.0]).gaussian(0.0).is_err());
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
        let gaussian = Gaussian::fit(&rows).unwrap();
        assert!(gaussian.distance(&rows[0]).is_finite());
        let equal = vec![vec![1.0; 4]; 5];
        let gaussian = Gaussian::fit(&equal).unwrap();
        assert!(gaussian.distance(&equal[0]).abs() < 1e-9);
        assert!(Gaussian::fit(&vec![vec![f32::NAN; 2]; 3]).is_err());
        assert!(Gaussian::fit(&[]).is_err());
    }
}
