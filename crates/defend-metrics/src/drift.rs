//! Whether new scores are distributed as earlier ones.

use crate::Error;

/// Terms of Kolmogorov's series: each is smaller than the last by `exp(-2 (2k + 1) x^2)`.
const TERMS: i32 = 100;

/// Below this the series is 1 to the last digit, and needs more terms the smaller it is.
const SURELY_ONE: f64 = 0.2;

/// How far two samples of scores are apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drift {
    /// Largest distance between their distribution functions, `0..=1` (Kolmogorov and Smirnov).
    pub distance: f64,
    /// Probability of a distance as large where both come from one distribution, in the limit of large samples (some thirty scores each are
    /// enough for two digits); too large where many scores are equal.
    pub p_value: f64,
}

/// Compares new scores with those of a calibration, `ascending`: p-values of the new ones are uniform where the two are distributed alike.
///
/// # Errors
/// [`Error::Empty`] when one of the two is empty; [`Error::NotFinite`].
pub fn drift(ascending: &[f64], scores: &[f64]) -> Result<Drift, Error> {
    for values in [ascending, scores] {
        crate::sweep::finite(values.into())?;
    }
    let mut new = scores.to_vec();
    new.sort_by(f64::total_cmp);
    let (n, m) = (ascending.len() as f64, new.len() as f64);
    let (mut i, mut j, mut distance) = (0, 0, 0f64);
    while let (Some(a), Some(b)) = (ascending.get(i), new.get(j)) {
        let at = a.min(*b);
        i += ascending[i..].iter().take_while(|v| **v <= at).count();
        j += new[j..].iter().take_while(|v| **v <= at).count();
        distance = distance.max((i as f64 / n - j as f64 / m).abs());
    }
    let p_value = kolmogorov((n * m / (n + m)).sqrt() * distance);
    Ok(Drift { distance, p_value })
}

/// `2 sum_k (-1)^(k - 1) exp(-2 k^2 x^2)`: the chance of a scaled distance above `x`. (The one of statrs does not end at 0.)
fn kolmogorov(x: f64) -> f64 {
    if x < SURELY_ONE {
        return 1.0;
    }
    let term = |k: i32| (-2.0 * f64::from(k * k) * x * x).exp();
    let pairs = (1..TERMS).step_by(2).map(|k| term(k) - term(k + 1));
    (2.0 * pairs.sum::<f64>()).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use defend_random::Rng;
    use rand::RngExt;

    /// `scipy.stats.ks_2samp`'s distance, and `scipy.stats.kstwobign.sf` of it times (n m / (n + m)) ^ .5.
    #[test]
    fn distance_and_p_value_are_scipys() {
        let a: Vec<f64> = (0..40).map(|i| f64::from(i) / 40.0).collect();
        let b: Vec<f64> = (0..30).map(|i| (f64::from(i) / 30.0).powi(2)).collect();
        let found = drift(&a, &b).unwrap();
        assert!((found.distance - 0.275).abs() < 1e-12, "{found:?}");
        assert!(
            (found.p_value - 0.149_549_377_153_492).abs() < 1e-9,
            "{found:?}"
        );
        let same = drift(&a, &a).unwrap();
        assert!(
            same.distance < 1e-12 && same.p_value > 0.999_999,
            "{same:?}"
        );
        assert!(matches!(drift(&a, &[]), Err(Error::Empty { .. })));
        assert!(matches!(
            drift(&a, &[f64::NAN]),
            Err(Error::NotFinite { .. })
        ));
    }

    #[test]
    fn a_level_is_kept_and_a_shift_is_found() {
        let rng = &mut Rng::seed(5);
        let mut sample = |n: usize, shift: f64| -> Vec<f64> {
            let mut values: Vec<f64> = (0..n).map(|_| rng.random_range(0.0..1.0) + shift).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let mut share = |shift: f64| {
            let called = (0..1000).filter(|_| {
                let (old, new) = (sample(150, 0.0), sample(100, shift));
                drift(&old, &new).unwrap().p_value <= 0.05
            });
            called.count()
        };
        let (alike, shifted) = (share(0.0), share(0.3));
        // 50 are expected, three standard errors are 21; the limit errs on the careful side.
        assert!((15..=71).contains(&alike), "{alike}");
        assert!(shifted > 950, "{shifted}");
    }
}
