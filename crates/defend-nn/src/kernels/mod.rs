//! `f32` CPU kernels behind [`crate::ops`].
//!
//! The only module of the workspace that may use `unsafe`, and only to call the `gemm` crate, whose
//! interface is raw pointers: [`product`] checks every extent before it hands them over.

pub(crate) mod math;
#[allow(unsafe_code)]
pub(crate) mod product;

/// Rows a parallel task handles in element-wise kernels: fixed, so that sums over rows are added in
/// the same order whatever the number of threads.
pub(crate) const ROWS_PER_TASK: usize = 128;
