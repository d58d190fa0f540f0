//! How the learning rate changes over the steps of a run.

use serde::{Deserialize, Serialize};

/// A multiplier of the peak learning rate, as a function of the step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Schedule {
    /// Always 1 (the paper's dense stage).
    Constant,
    /// Linear warm-up over the first `warmup` share of the steps (`0..1`), then a half cosine down to
    /// the `floor` share of the peak (`0..=1`).
    Cosine {
        /// Share of all steps spent on the warm-up.
        warmup: f64,
        /// Multiplier at the end.
        floor: f64,
    },
}

impl Schedule {
    /// Multiplier for `step` (from 0) of `total` steps.
    pub fn multiplier(self, step: usize, total: usize) -> f64 {
        match self {
            Self::Constant => 1.0,
            Self::Cosine { warmup, floor } => {
                let warm = (warmup * total as f64).round();
                let step = step as f64;
                if step < warm {
                    return (step + 1.0) / warm;
                }
                let progress = (step - warm) / (total as f64 - warm).max(1.0);
                half_cosine(1.0, floor, progress)
            }
        }
    }

    /// Checks that shares lie in their ranges.
    ///
    /// # Errors
    /// [`crate::Error::Config`] that names the field.
    pub fn validate(self) -> Result<(), crate::Error> {
        let Self::Cosine { warmup, floor } = self else {
            return Ok(());
        };
        for (field, value) in [("schedule.warmup", warmup), ("schedule.floor", floor)] {
            if !(0.0..=1.0).contains(&value) {
                return Err(crate::Error::Config {
                    field,
                    value,
                    expected: "a share in 0..=1",
                });
            }
        }
        Ok(())
    }
}

/// From `first` at `progress` 0 to `last` at 1, along a half cosine.
pub fn half_cosine(first: f64, last: f64, progress: f64) -> f64 {
    last + 0.5 * (first - last) * (1.0 + (std::f64::consts::PI * progress).cos())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosine_rises_then_falls_to_its_floor() {
        let schedule = Schedule::Cosine {
            warmup: 0.1,
            floor: 0.2,
        };
        assert!((schedule.multiplier(0, 100) - 0.1).abs() < 1e-12);
        assert!((schedule.multiplier(10, 100) - 1.0).abs() < 1e-12);
        assert!((schedule.multiplier(55, 100) - 0.6).abs() < 1e-12);
        assert!(schedule.multiplier(99, 100) < 0.21);
        assert!(
            Schedule::Cosine {
                warmup: 1.5,
                floor: 0.0
            }
            .validate()
            .is_err()
        );
    }
}
