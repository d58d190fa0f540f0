//! Sinkhorn-Knopp for any range of scores: `log Q = scores / epsilon - a - b` with an offset `a` for each row and `b` for each
//! column.
//!
//! Only the offsets change, so an iteration is one pass over the scores.

use defend_kernels::{vector, vectorised};
use rayon::prelude::*;

use super::{Problem, ROWS_PER_TASK};

/// Largest value and `sum(exp(value - largest))` of each column.
struct Columns {
    largest: Vec<f32>,
    sums: Vec<f32>,
}

pub(super) fn assign(problem: &Problem<'_>) -> Vec<f32> {
    let (task, rows, prototypes) = (problem.task(), problem.rows(), problem.prototypes);
    let mut scores = problem.scores.to_vec();
    vectorised!(|| scores.iter_mut().for_each(|s| *s = problem.logarithm(*s)));
    let mut row_offsets = vec![0f32; rows];
    let zeros = vec![0f32; ROWS_PER_TASK];
    let columns = scores.par_chunks(task);
    let mut columns: Vec<Columns> = columns
        .map(|s| sum_columns(s, &zeros, prototypes))
        .collect();
    for iteration in 1..=problem.iterations {
        let offsets = column_offsets(&columns, prototypes);
        if iteration == problem.iterations {
            scores.par_chunks_mut(task).for_each(|scores| {
                vectorised!(|| {
                    for row in scores.chunks_exact_mut(prototypes) {
                        softmax(row, &offsets);
                    }
                });
            });
            break;
        }
        columns = scores
            .par_chunks(task)
            .zip(row_offsets.par_chunks_mut(ROWS_PER_TASK))
            .map(|(scores, row_offsets)| {
                let mut scratch = vec![0f32; prototypes];
                vectorised!(|| {
                    for (row, at) in scores.chunks_exact(prototypes).zip(&mut *row_offsets) {
                        scratch.copy_from_slice(row);
                        let (largest, sum) = softmax(&mut scratch, &offsets);
                        *at = largest + sum.ln() + (rows as f32).ln();
                    }
                });
                sum_columns(scores, row_offsets, prototypes)
            })
            .collect();
    }
    scores
}

/// Replaces a row of logarithms by `softmax(row - offsets)`; its largest value and the sum before the division.
#[inline(always)]
fn softmax(row: &mut [f32], offsets: &[f32]) -> (f32, f32) {
    row.iter_mut().zip(offsets).for_each(|(v, b)| *v -= b);
    let largest = vector::max(row);
    for v in row.iter_mut() {
        *v = vector::exp(*v - largest);
    }
    let sum = vector::sum(row);
    let scale = 1.0 / sum;
    for v in row.iter_mut() {
        *v *= scale;
    }
    (largest, sum)
}

fn sum_columns(scores: &[f32], row_offsets: &[f32], prototypes: usize) -> Columns {
    let mut largest = vec![f32::NEG_INFINITY; prototypes];
    let mut sums = vec![0f32; prototypes];
    vectorised!(|| {
        for (row, a) in scores.chunks_exact(prototypes).zip(row_offsets) {
            for (top, v) in largest.iter_mut().zip(row) {
                let v = v - a;
                *top = if v > *top { v } else { *top };
            }
        }
        for (row, a) in scores.chunks_exact(prototypes).zip(row_offsets) {
            for ((sum, top), v) in sums.iter_mut().zip(&largest).zip(row) {
                *sum += vector::exp(v - a - top);
            }
        }
    });
    Columns { largest, sums }
}

/// The offsets that give every prototype the mass 1/K.
fn column_offsets(blocks: &[Columns], prototypes: usize) -> Vec<f32> {
    let column = |k: usize| {
        let tops = blocks.iter().map(|block| block.largest[k]);
        let top = tops.fold(f32::NEG_INFINITY, f32::max);
        let sums = blocks
            .iter()
            .map(|b| b.sums[k] * (b.largest[k] - top).exp());
        top + sums.sum::<f32>().ln() + (prototypes as f32).ln()
    };
    (0..prototypes).map(column).collect()
}
