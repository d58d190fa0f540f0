//! Values on the scale of the normal images' own left-out values.

use serde::{Deserialize, Serialize};

/// Fewer left-out values than this have no spread worth dividing by.
const LEAST_VALUES: usize = 3;
/// A spread below this share of the values is rounding.
const LEAST_SPREAD: f64 = 1e-9;

/// Mean and standard deviation of left-out values.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Standard {
    /// Mean.
    pub mean: f64,
    /// Standard deviation with `n - 1`.
    pub deviation: f64,
}

impl Standard {
    /// Of left-out values, of which there may be none.
    ///
    /// Fewer than three, or values without any spread, say nothing of a scale: they give the deviation 1, so that values stay
    /// in their own units, and none at all give the mean 0.
    pub fn from_values(values: &[f64]) -> Self {
        let n = values.len();
        if n == 0 {
            return Self {
                mean: 0.0,
                deviation: 1.0,
            };
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let squares: f64 = values.iter().map(|v| (v - mean) * (v - mean)).sum();
        let deviation = (squares / (n.max(2) - 1) as f64).sqrt();
        if n < LEAST_VALUES || deviation <= LEAST_SPREAD * (1.0 + mean.abs()) {
            return Self {
                mean,
                deviation: 1.0,
            };
        }
        Self { mean, deviation }
    }

    /// `(value - mean) / deviation`.
    pub fn z(self, value: f64) -> f64 {
        (value - self.mean) / self.deviation
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_without_a_spread_keep_their_units() {
        assert_eq!(Standard::from_values(&[]).z(3.0), 3.0);
        assert_eq!(Standard::from_values(&[1.0]).z(3.0), 2.0);
        assert_eq!(Standard::from_values(&[1.0, 2.0]).z(3.5), 2.0);
        assert_eq!(Standard::from_values(&[5.0; 7]).z(6.0), 1.0);
        assert_eq!(Standard::from_values(&[1.0, 2.0, 3.0]).z(4.0), 2.0);
    }
}
