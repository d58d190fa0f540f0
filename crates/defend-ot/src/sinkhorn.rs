//! Sinkhorn-Knopp in a form that neither overflows nor starves a prototype.

use candle_core::{DType, Result as CandleResult, Tensor};
use defend_nn::ops::with_slices;
use serde::{Deserialize, Serialize};

use crate::{Assigner, Error, kernel};

/// Alternating normalisation of `exp(scores / epsilon)` (Cuturi, 2013; SwAV, appendix A).
///
/// One iteration gives every prototype the mass 1/K, then every feature the mass 1/R; the result is
/// scaled so that a feature's row sums to one. Works in `f32` (or the scores' `f64`), as `exp(1 / 0.05)` overflows half
/// precision, and on logarithms, so that a prototype that is far from every feature does not starve. Where the scores' range
/// divided by `epsilon` is at most 50, as it is for cosines at 0.05, the CPU takes the exponentials themselves.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SinkhornKnopp {
    /// Entropic regularisation, positive; small values give hard assignments. SwAV: 0.05.
    pub epsilon: f64,
    /// Number of iterations, at least 1. SwAV: 3.
    pub iterations: usize,
}

impl Default for SinkhornKnopp {
    fn default() -> Self {
        Self {
            epsilon: 0.05,
            iterations: 3,
        }
    }
}

impl SinkhornKnopp {
    /// Checks the ranges of the fields.
    ///
    /// # Errors
    /// [`Error::Config`] that names the field.
    pub fn validate(&self) -> Result<(), Error> {
        if !(self.epsilon.is_finite() && self.epsilon > 0.0) {
            return Err(Error::Config {
                field: "epsilon",
                value: self.epsilon,
                expected: "a positive number",
            });
        }
        if self.iterations == 0 {
            return Err(Error::Config {
                field: "iterations",
                value: 0.0,
                expected: "at least 1",
            });
        }
        Ok(())
    }
}

/// `log(sum(exp(x)))` along a dimension, kept with extent one.
fn log_sum_exp(x: &Tensor, dim: usize) -> CandleResult<Tensor> {
    let top = x.max_keepdim(dim)?;
    x.broadcast_sub(&top)?.exp()?.sum_keepdim(dim)?.log()? + top
}

impl Assigner for SinkhornKnopp {
    fn assign(&self, scores: &Tensor) -> Result<Tensor, Error> {
        self.validate()?;
        let wrong = |found: String| Err(Error::Scores { found });
        let (rows, prototypes) = match scores.dims() {
            &[rows, prototypes] if rows > 0 && prototypes > 0 => (rows, prototypes),
            dims => return wrong(format!("have shape {dims:?}")),
        };
        let wide = match scores.dtype() {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        let scores = scores.detach().to_dtype(wide)?;
        let not_finite = || {
            wrong(format!(
                "of shape [{rows}, {prototypes}] hold NaN or infinite values, or their range divided by epsilon is infinite"
            ))
        };
        if scores.device().is_cpu() && wide == DType::F32 {
            let epsilon = self.epsilon as f32;
            let q = with_slices("Sinkhorn-Knopp", [&scores], |[scores]| {
                Ok(kernel::assign(scores, prototypes, epsilon, self.iterations))
            });
            return match q? {
                Some(q) => Ok(Tensor::from_vec(q, (rows, prototypes), scores.device())?),
                None => not_finite(),
            };
        }
        if !scores
            .sqr()?
            .sum_all()?
            .to_device(&candle_core::Device::Cpu)? // Metal has no f64
            .to_dtype(DType::F64)?
            .to_scalar::<f64>()?
            .is_finite()
        {
            return not_finite();
        }
        let mut log_q = (scores / self.epsilon)?;
        for _ in 0..self.iterations {
            let mass = (log_sum_exp(&log_q, 0)? + (prototypes as f64).ln())?;
            log_q = log_q.broadcast_sub(&mass)?;
            let mass = (log_sum_exp(&log_q, 1)? + (rows as f64).ln())?;
            log_q = log_q.broadcast_sub(&mass)?;
        }
        // Every row now has the mass 1/R; its conditional distribution sums to one.
        let log_mass = log_sum_exp(&log_q, 1)?;
        Ok(log_q.broadcast_sub(&log_mass)?.exp()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use proptest::prelude::*;

    fn assign(scores: Vec<f32>, k: usize, sinkhorn: SinkhornKnopp) -> Vec<Vec<f32>> {
        let rows = scores.len() / k;
        let scores = Tensor::from_vec(scores, (rows, k), &Device::Cpu).unwrap();
        sinkhorn.assign(&scores).unwrap().to_vec2().unwrap()
    }

    proptest! {
        #[test]
        fn marginals_hold(scores in prop::collection::vec(-1f32..1.0, 12 * 4)) {
            let converged = SinkhornKnopp { iterations: 2000, epsilon: 0.1 };
            let q = assign(scores, 4, converged);
            for row in &q {
                prop_assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-4);
                prop_assert!(row.iter().all(|v| *v >= 0.0));
            }
            for k in 0..4 {
                let used: f32 = q.iter().map(|row| row[k]).sum();
                prop_assert!((used - 3.0).abs() < 0.03, "prototype {k} has mass {used}");
            }
        }

        #[test]
        fn a_permutation_of_the_features_permutes_the_result(
            scores in prop::collection::vec(-1f32..1.0, 9 * 3),
        ) {
            let q = assign(scores.clone(), 3, SinkhornKnopp::default());
            let reversed = scores.chunks(3).rev().flatten().copied().collect();
            let r = assign(reversed, 3, SinkhornKnopp::default());
            for (a, b) in q.iter().zip(r.iter().rev()) {
                for (a, b) in a.iter().zip(b) {
                    prop_assert!((a - b).abs() < 1e-5);
                }
            }
        }
    }

    #[test]
    fn a_starving_prototype_and_tiny_epsilon_stay_finite() {
        // exp(-1 / 0.005) = 1e-87 is zero in f32: only the log domain keeps the second prototype alive.
        let sinkhorn = SinkhornKnopp {
            epsilon: 0.005,
            iterations: 3,
        };
        let q = assign(
            vec![1.0, -1.0, 1.0, -0.9, 0.9, -1.0, 0.8, -1.0],
            2,
            sinkhorn,
        );
        let used: f32 = q.iter().map(|row| row[1]).sum();
        assert!(
            q.iter().flatten().all(|v| v.is_finite()) && used > 0.5,
            "{q:?}"
        );
    }

    #[test]
    fn half_precision_scores_are_assigned_in_f32() {
        let scores: Vec<f32> = (0..64 * 5).map(|i| (i as f32 * 0.7).sin()).collect();
        let scores = Tensor::from_vec(scores, (64, 5), &Device::Cpu).unwrap();
        for half in [DType::F16, DType::BF16] {
            let rounded = scores.to_dtype(half).unwrap();
            let assign = |scores: &Tensor| SinkhornKnopp::default().assign(scores).unwrap();
            let found = assign(&rounded);
            assert_eq!(found.dtype(), DType::F32);
            let expected = assign(&rounded.to_dtype(DType::F32).unwrap());
            assert_eq!(
                found.to_vec2::<f32>().unwrap(),
                expected.to_vec2::<f32>().unwrap()
            );
        }
    }

    #[test]
    fn bad_scores_and_settings_are_refused() {
        let scores = Tensor::new(&[[f32::NAN, 0.0]], &Device::Cpu).unwrap();
        assert!(matches!(
            SinkhornKnopp::default().assign(&scores),
            Err(Error::Scores { .. })
        ));
        let scores = scores.zeros_like().unwrap();
        let sinkhorn = SinkhornKnopp {
            epsilon: 0.0,
            iterations: 3,
        };
        assert!(matches!(
            sinkhorn.assign(&scores),
            Err(Error::Config {
                field: "epsilon",
                ..
            })
        ));
        let flat = scores.flatten_all().unwrap();
        assert!(matches!(
            SinkhornKnopp::default().assign(&flat),
            Err(Error::Scores { .. })
        ));
    }
}
