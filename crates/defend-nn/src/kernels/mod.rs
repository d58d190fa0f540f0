//! `f32` CPU kernels behind [`crate::ops`], in safe code but for the instructions of [`bf16`], [`prefetch`] and [`square`].
//!
//! Products ([`packed`]) and what lies between them work on activations in blocks of columns ([`blocked`]).

use crate::vectorised;
use rayon::prelude::*;

pub(crate) mod attention;
pub(crate) mod bf16;
pub(crate) mod block;
pub(crate) mod blocked;
pub(crate) mod local;
pub(crate) mod math;
pub(crate) mod norm;
pub(crate) mod packed;
pub(crate) mod pool;
#[allow(unsafe_code)]
mod prefetch;
#[allow(unsafe_code)]
mod square;

/// Rows a parallel task handles in element-wise kernels: fixed, so that sums over rows are added in
/// the same order whatever the number of threads.
pub(crate) const ROWS_PER_TASK: usize = 128;

/// Sums of the columns of a row-major matrix, in an order that does not depend on the threads.
pub(crate) fn column_sums(values: &[f32], columns: usize) -> Vec<f32> {
    let partial: Vec<Vec<f32>> = values
        .par_chunks(ROWS_PER_TASK * columns)
        .map(|rows| {
            let mut sums = vec![0f32; columns];
            vectorised!(|| {
                for row in rows.chunks_exact(columns) {
                    sums.iter_mut().zip(row).for_each(|(s, v)| *s += v);
                }
            });
            sums
        })
        .collect();
    let mut total = vec![0f32; columns];
    for sums in partial {
        total.iter_mut().zip(sums).for_each(|(t, s)| *t += s);
    }
    total
}
