//! Sinkhorn-Knopp as factors of rows and columns: `Q = diag(u) E diag(v)` with `E = exp((scores - largest) / epsilon)`.
//!
//! Only the factors change, so there is one exponential for each score, and an iteration is one pass of multiplications.

use defend_kernels::{vector, vectorised};
use rayon::prelude::*;

use super::Problem;

pub(super) fn assign(problem: &Problem<'_>) -> Vec<f32> {
    let (task, rows, prototypes) = (problem.task(), problem.rows(), problem.prototypes);
    let mut e = vec![0f32; problem.scores.len()];
    let scores = problem.scores.par_chunks(task);
    let blocks = e.par_chunks_mut(task).zip(scores);
    let sums = blocks.map(|(e, scores)| {
        let mut sums = vec![0f32; prototypes];
        vectorised!(|| {
            for (e, s) in e.iter_mut().zip(scores) {
                *e = vector::exp(problem.logarithm(*s));
            }
            for row in e.chunks_exact(prototypes) {
                sums.iter_mut().zip(row).for_each(|(sum, e)| *sum += e);
            }
        });
        sums
    });
    let mut v = column_factors(sums.collect(), prototypes);
    for _ in 1..problem.iterations {
        let sums = e.par_chunks(task).map(|e| {
            let mut sums = vec![0f32; prototypes];
            vectorised!(|| {
                for row in e.chunks_exact(prototypes) {
                    let u = 1.0 / (vector::dot(row, &v) * rows as f32);
                    sums.iter_mut().zip(row).for_each(|(sum, e)| *sum += u * e);
                }
            });
            sums
        });
        v = column_factors(sums.collect(), prototypes);
    }
    e.par_chunks_mut(task).for_each(|e| {
        vectorised!(|| {
            for row in e.chunks_exact_mut(prototypes) {
                // A row's own factor falls out: it sums to one.
                let u = 1.0 / vector::dot(row, &v);
                row.iter_mut().zip(&v).for_each(|(e, v)| *e *= u * v);
            }
        });
    });
    e
}

/// The factors that give every prototype the mass 1/K, from the blocks' sums of the columns.
fn column_factors(blocks: Vec<Vec<f32>>, prototypes: usize) -> Vec<f32> {
    let mut total = vec![0f32; prototypes];
    for sums in blocks {
        total.iter_mut().zip(sums).for_each(|(t, s)| *t += s);
    }
    total
        .iter()
        .map(|t| 1.0 / (t * prototypes as f32))
        .collect()
}
