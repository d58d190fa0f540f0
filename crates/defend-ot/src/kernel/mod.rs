//! Sinkhorn-Knopp on an `f32` matrix in memory.
//!
//! Rows are worked in blocks of a fixed size whose column sums are joined in order: the result does not depend on the number
//! of threads.

mod logarithms;
mod scaling;

use defend_nn::vectorised;
use rayon::prelude::*;

const ROWS_PER_TASK: usize = 256;

/// Range of `scores / epsilon` up to which [`scaling`] neither overflows nor starves a prototype: its factors are at most
/// `exp(50)` apart, 5e21, and `f32` ends at 3e38.
const SCALING_RANGE: f32 = 50.0;

/// `scores`: `[R, K]`; returns Q with rows that sum to one, and `None` when a score is not a number or infinite.
pub(crate) fn assign(
    scores: &[f32],
    prototypes: usize,
    epsilon: f32,
    iterations: usize,
) -> Option<Vec<f32>> {
    let (smallest, largest) = range(scores, prototypes)?;
    let inverse = 1.0 / epsilon;
    Some(if (largest - smallest) * inverse <= SCALING_RANGE {
        scaling::assign(scores, largest, prototypes, inverse, iterations)
    } else {
        logarithms::assign(scores, prototypes, inverse, iterations)
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
        let ((a, b), (c, d)) = (a?, b?);
        Some((a.min(c), b.max(d)))
    };
    ranges.reduce(|| Some((f32::MAX, f32::MIN)), joined)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * 0.7).sin()).collect()
    }

    #[test]
    fn both_ways_agree() {
        for (rows, prototypes) in [(700, 5), (300, 20), (10, 77), (1, 3), (4, 1)] {
            let scores = noise(rows * prototypes);
            let (smallest, largest) = range(&scores, prototypes).unwrap();
            // Up to the range's end.
            for inverse in [1.0, 20.0, SCALING_RANGE / (largest - smallest).max(1.0)] {
                for iterations in [1, 2, 3, 100] {
                    let a = scaling::assign(&scores, largest, prototypes, inverse, iterations);
                    let b = logarithms::assign(&scores, prototypes, inverse, iterations);
                    for (a, b) in a.iter().zip(&b) {
                        assert!((a - b).abs() < 2e-5, "{rows} {prototypes}: {a} {b}");
                    }
                }
            }
        }
    }

    #[test]
    fn ranges_and_values_that_are_none() {
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
    }
}
