//! The one pass over sorted scores from which every threshold-free figure is read.

use ndarray::ArrayView1;

use crate::{Class, Error};

/// Counts of everything that scores at least `threshold`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    pub(crate) threshold: f64,
    pub(crate) false_alarms: usize,
    pub(crate) hits: usize,
}

/// One [`Step`] for each distinct score, highest first; equal scores are never split, so no figure
/// depends on the order of the input.
#[derive(Debug)]
pub(crate) struct Sweep {
    pub(crate) steps: Vec<Step>,
    pub(crate) normal: usize,
    pub(crate) abnormal: usize,
}

impl Sweep {
    pub(crate) fn new(
        scores: ArrayView1<'_, f64>,
        abnormal: ArrayView1<'_, bool>,
    ) -> Result<Self, Error> {
        check(scores, abnormal, 1)?;
        let mut samples: Vec<(f64, bool)> = scores
            .into_iter()
            .copied()
            .zip(abnormal)
            .map(|(s, &a)| (s, a))
            .collect();
        samples.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));

        let mut steps: Vec<Step> = Vec::new();
        let (mut false_alarms, mut hits) = (0, 0);
        for (score, novel) in samples {
            if novel {
                hits += 1;
            } else {
                false_alarms += 1;
            }
            let step = Step {
                threshold: score,
                false_alarms,
                hits,
            };
            match steps.last_mut() {
                // `==` and not the bits: -0.0 and 0.0 are one threshold.
                Some(last) if last.threshold == score => *last = step,
                _ => steps.push(step),
            }
        }
        Ok(Self {
            steps,
            normal: false_alarms,
            abnormal: hits,
        })
    }

    pub(crate) fn false_alarm_rate(&self, step: &Step) -> f64 {
        step.false_alarms as f64 / self.normal as f64
    }

    pub(crate) fn hit_rate(&self, step: &Step) -> f64 {
        step.hits as f64 / self.abnormal as f64
    }
}

/// Refuses what no figure can be computed from: two lengths, NaN, fewer than `needed` of a class.
pub(crate) fn check(
    scores: ArrayView1<'_, f64>,
    abnormal: ArrayView1<'_, bool>,
    needed: usize,
) -> Result<(), Error> {
    if scores.len() != abnormal.len() {
        return Err(Error::Length {
            left_name: "scores",
            left: scores.len(),
            right_name: "labels",
            right: abnormal.len(),
        });
    }
    finite(scores)?;
    let novel = abnormal.iter().filter(|&&a| a).count();
    for (class, found) in [
        (Class::Normal, abnormal.len() - novel),
        (Class::Abnormal, novel),
    ] {
        if found < needed {
            return Err(Error::TooFew {
                class,
                found,
                needed,
            });
        }
    }
    Ok(())
}

/// Refuses an empty list and any score that is NaN or infinite.
pub(crate) fn finite(scores: ArrayView1<'_, f64>) -> Result<(), Error> {
    if scores.is_empty() {
        return Err(Error::Empty { what: "scores" });
    }
    match scores.iter().enumerate().find(|(_, s)| !s.is_finite()) {
        Some((index, &value)) => Err(Error::NotFinite { index, value }),
        None => Ok(()),
    }
}
