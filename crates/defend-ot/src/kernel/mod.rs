//! Sinkhorn-Knopp on an `f32` matrix in memory.
//!
//! Rows are worked in blocks of a fixed size whose column sums are joined in order: the result does not depend on the number
//! of threads.

mod logarithms;
mod scaling;

use defend_kernels::vectorised;
use rayon::prelude::*;

const ROWS_PER_TASK: usize = 256;

/// Range of `scores / epsilon` up to which [`scaling`] neither overflows nor starves a prototype. Its exponentials lie between
/// `exp(-50)` and 1, so the first factors of the columns lie between 1 / (R K) and `exp(50)` / (R K), 5e21 / (R K), and those of
/// the rows between `exp(-50)` and `exp(50)`; iterations never widen these bounds, and `f32` reaches from 1e-38 to 3e38.
const SCALING_RANGE: f32 = 50.0;

/// What Q is computed from.
struct Problem<'a> {
    /// `[R, K]`.
    scores: &'a [f32],
    prototypes: usize,
    /// Of the scores.
    largest: f32,
    /// 1 / epsilon.
    inverse: f32,
    iterations: usize,
}

impl Problem<'_> {
    fn rows(&self) -> usize {
        self.scores.len() / self.prototypes
    }

    /// Scores that a task works on.
    fn task(&self) -> usize {
        ROWS_PER_TASK * self.prototypes
    }

    /// The logarithm that Q begins with, at most zero.
    #[inline(always)]
    fn logarithm(&self, score: f32) -> f32 {
        (score - self.largest) * self.inverse
    }
}

/// `scores`: `[R, K]`; returns Q with rows that sum to one, and `None` when a score is not a number or infinite, or when the
/// scores' range divided by `epsilon` is.
pub(crate) fn assign(
    scores: &[f32],
    prototypes: usize,
    epsilon: f32,
    iterations: usize,
) -> Option<Vec<f32>> {
    let (smallest, largest) = range(scores, prototypes)?;
    let inverse = 1.0 / epsilon;
    let span = (largest - smallest) * inverse;
    span.is_finite().then(|| {
        let assign = if span <= SCALING_RANGE {
            scaling::assign
        } else {
            logarithms::assign
        };
        assign(&Problem {
            scores,
            prototypes,
            largest,
            inverse,
            iterations,
        })
    })
}

/// Smallest and largest value of a matrix, if all are finite.
fn range(scores: &[f32], prototypes: usize) -> Option<(f32, f32)> {
    let blocks = scores.par_chunks(ROWS_PER_TASK * prototypes);
    let ranges = blocks.map(|scores| {
        let (mut smallest, mut largest, mut finite) = ([f32::MAX; 16], [f32::MIN; 16], [true; 16]);
        vectorised!(|| {
            for scores in scores.chunks(16) {
                let lanes = smallest.iter_mut().zip(&mut largest).zip(&mut finite);
                for (((smallest, largest), finite), s) in lanes.zip(scores) {
                    *smallest = if s < smallest { *s } else { *smallest };
                    *largest = if s > largest { *s } else { *largest };
                    *finite &= s.is_finite();
                }
            }
        });
        let smallest = smallest.into_iter().fold(f32::MAX, f32::min);
        let largest = largest.into_iter().fold(f32::MIN, f32::max);
        finite.iter().all(|f| *f).then_some((smallest, largest))
    });
    let joined = |a: Option<(f32, f32)>, b: Option<(f32, f32)>| {
        let ((low, high), (lower, higher)) = (a?, b?);
        Some((low.min(lower), high.max(higher)))
    };
    ranges.reduce(|| Some((f32::MAX, f32::MIN)), joined)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * 0.7).sin()).collect()
    }

    fn check(scores: &[f32], prototypes: usize, inverse: f32, iterations: usize) {
        let (_, largest) = range(scores, prototypes).unwrap();
        let problem = Problem {
            scores,
            prototypes,
            largest,
            inverse,
            iterations,
        };
        let (a, b) = (scaling::assign(&problem), logarithms::assign(&problem));
        for (a, b) in a.iter().zip(&b) {
            assert!((a - b).abs() < 2e-5, "{prototypes} {inverse}: {a} {b}");
        }
    }

    #[test]
    fn both_ways_agree() {
        for (rows, prototypes) in [(700, 5), (300, 20), (10, 77), (1, 3), (4, 1)] {
            let scores = noise(rows * prototypes);
            let (smallest, largest) = range(&scores, prototypes).unwrap();
            for inverse in [1.0, 20.0, SCALING_RANGE / (largest - smallest).max(1.0)] {
                for iterations in [1, 2, 3, 100] {
                    check(&scores, prototypes, inverse, iterations);
                }
            }
        }
    }

    #[test]
    fn both_ways_agree_at_the_end_of_the_range() {
        let (rows, prototypes) = (300, 8);
        let mut either: Vec<f32> = noise(rows * prototypes)
            .iter()
            .map(|v| if *v > 0.3 { 0.0 } else { -1.0 })
            .collect();
        let only_one_row = |i: usize| i.is_multiple_of(prototypes) && i != 5 * prototypes;
        let starving: Vec<f32> = (0..rows * prototypes)
            .map(|i| if only_one_row(i) { -1.0 } else { 0.0 })
            .collect();
        for iterations in [1, 2, 3, 100] {
            check(&either, prototypes, SCALING_RANGE, iterations);
            check(&starving, prototypes, SCALING_RANGE, iterations);
        }
        // A row far from all prototypes.
        either[..prototypes].fill(-1.0);
        check(&either, prototypes, SCALING_RANGE, 3);
    }

    #[test]
    fn a_range_needs_finite_scores() {
        let mut scores = noise(1000);
        (scores[401], scores[998]) = (-3.0, 7.0);
        assert_eq!(range(&scores, 4), Some((-3.0, 7.0)));
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 500, 999] {
                let mut scores = scores.clone();
                scores[at] = wrong;
                assert_eq!(range(&scores, 4), None);
            }
        }
        // What is left of these divided by epsilon is no number.
        assert_eq!(assign(&[3e37, 0.0], 2, 0.05, 3), None);
        assert_eq!(assign(&[3e38, -3e38], 2, 1.0, 3), None);
        // Large, but near each other.
        let near = assign(&[3e37, 3e37], 2, 0.05, 3).unwrap();
        assert_eq!(near, [0.5, 0.5]);
    }
}
