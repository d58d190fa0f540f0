//! CPU kernels on slices of `f32`, in safe code but for the instructions of [`bf16`], `prefetch` and `square`: what the differentiable
//! operations of `defend-nn` run on. Use that crate unless you write operations of your own.
//!
//! Products ([`product`]) and what lies between them work on activations in blocks of columns ([`panel_layout`]). Results depend neither
//! on the number of threads nor on the width of the processor's vectors.

use rayon::prelude::*;

pub mod adamw;
pub mod attention;
pub mod bf16;
pub mod format;
mod gemm;
pub mod local;
pub mod math;
pub mod microkernel;
pub mod norm;
pub mod pack;
pub mod panel_layout;
pub mod pool;
#[allow(unsafe_code)]
mod prefetch;
#[allow(unsafe_code)]
mod processor;
pub mod product;
pub mod rounding;
#[allow(unsafe_code)]
mod square;
pub mod transformer_block;
pub mod weight_gradient;

/// Building blocks of `f32` loops that the compiler turns into vector instructions.
pub mod vector {
    pub use crate::math::{dispatch, dot, exp, max, sum};
}

/// Rows a parallel task handles in element-wise kernels: fixed, so that sums over rows are added in
/// the same order whatever the number of threads.
pub const ROWS_PER_TASK: usize = 128;

/// Sums of the columns of a row-major matrix, in an order that does not depend on the threads.
pub fn column_sums(values: &[f32], columns: usize) -> Vec<f32> {
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

/// The README's example runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
