//! Products, distances and inverses, by faer.
//!
//! Matrices are cut into tasks whose size does not depend on the machine, each computed by one thread, so that neither do
//! the bits of a result.

use faer::linalg::matmul::matmul;
use faer::linalg::solvers::{DenseSolveCore, Solve};
use faer::traits::ComplexField;
use faer::{Accum, MatMut, MatRef, Par, Side};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, s};
use rayon::prelude::*;

use crate::Error;

/// Runs a closure marked `#[inline(always)]`, and what is inlined into it, compiled for the widest vector unit that this
/// processor has. (Passed to `Arch::dispatch` itself, a closure would become a function of its own, and not be compiled so.)
#[inline(always)]
pub(crate) fn vectorised<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}

/// e^x for `x` of at most 0, relative error below 2e-7; below -87 as at -87. Without a branch, so that loops become vector
/// instructions.
#[inline(always)]
pub(crate) fn exp_of_negative(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to the nearest whole number and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const TAYLOR: [f32; 6] = [
        1.987_569_2e-4,
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_6e-1,
        0.5,
    ];
    let x = x.clamp(-87.0, 0.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let rest = x - whole * LN2_HIGH - whole * LN2_LOW;
    let mut sum = 0.0;
    for factor in TAYLOR {
        sum = sum * rest + factor;
    }
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    (sum * rest * rest + rest + 1.0) * power
}

/// Rows of a product that a thread computes at a time: few of a batch of images, so that each thread gets some, and more of the
/// patches of an image or of a larger product, so that the right side is packed less often.
fn task_rows(rows: usize) -> usize {
    if rows > 128 { 128 } else { 16 }
}

/// A product has at least so many rows and columns: thinner ones are summed in another order, and an image's score would
/// depend on the batch that it is in.
const LEAST_ROWS: usize = 8;

/// `left right^T`: `[R, D]`, `[C, D]` -> `[R, C]`. A row's bits depend neither on the other rows nor on the threads.
pub(crate) fn product<T: ComplexField + Copy + Send + Sync>(
    left: ArrayView2<'_, T>,
    right: ArrayView2<'_, T>,
) -> Array2<T> {
    let (rows, columns, depth) = (left.nrows(), right.nrows(), left.ncols());
    if columns < LEAST_ROWS && columns > 0 {
        let mut padded = Array2::from_elem((LEAST_ROWS, depth), T::zero_impl());
        padded.slice_mut(s![..columns, ..]).assign(&right);
        let whole = product(left, padded.view());
        return whole
            .slice(s![.., ..columns])
            .as_standard_layout()
            .into_owned();
    }
    let (left, right) = (left.as_standard_layout(), right.as_standard_layout());
    let mut out = vec![T::zero_impl(); rows * columns];
    if let (Some(left), Some(right)) = (left.as_slice(), right.as_slice())
        && columns > 0
        && depth > 0
    {
        let right = MatRef::from_row_major_slice(right, columns, depth);
        let task = task_rows(rows);
        out.par_chunks_mut(task * columns)
            .zip(left.par_chunks(task * depth))
            .for_each(|(out, left)| {
                let rows = out.len() / columns;
                if rows >= LEAST_ROWS {
                    return multiply(out, left, right);
                }
                let mut padded = left.to_vec();
                padded.resize(LEAST_ROWS * depth, T::zero_impl());
                let mut whole = vec![T::zero_impl(); LEAST_ROWS * columns];
                multiply(&mut whole, &padded, right);
                out.copy_from_slice(&whole[..rows * columns]);
            });
    }
    // The vector has this many values: it was made so.
    Array2::from_shape_vec((rows, columns), out)
        .unwrap_or_else(|_| Array2::from_elem((0, 0), T::zero_impl()))
}

/// The row of `right` that each row of `left` is most similar to; the last of equal ones, 0 of none.
pub(crate) fn most_similar(left: ArrayView2<'_, f64>, right: ArrayView2<'_, f64>) -> Vec<usize> {
    let best = |row: ArrayView1<'_, f64>| {
        let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        best.map_or(0, |(place, _)| place)
    };
    product(left, right).rows().into_iter().map(best).collect()
}

fn multiply<T: ComplexField + Copy>(out: &mut [T], left: &[T], right: MatRef<'_, T>) {
    let (columns, depth) = right.shape();
    let rows = out.len() / columns;
    matmul(
        MatMut::from_row_major_slice_mut(out, rows, columns),
        Accum::Replace,
        MatRef::from_row_major_slice(left, rows, depth),
        right.transpose(),
        T::one_impl(),
        Par::Seq,
    );
}

/// Squared distances of unit rows, `[R, D]`, `[C, D]` -> `[R, C]` in `0..=4`.
pub(crate) fn squared_distances(
    left: ArrayView2<'_, f64>,
    right: ArrayView2<'_, f64>,
) -> Array2<f64> {
    let mut distances = product(left, right);
    distances.par_mapv_inplace(|similarity| (2.0 - 2.0 * similarity).max(0.0));
    distances
}

/// The Gaussian kernel `exp(-width |x - y|^2)` of unit rows.
pub(crate) fn kernel(
    left: ArrayView2<'_, f64>,
    right: ArrayView2<'_, f64>,
    width: f64,
) -> Array2<f64> {
    let mut kernel = squared_distances(left, right);
    kernel.par_mapv_inplace(|distance| (-width * distance).exp());
    kernel
}

/// Inverse of a symmetric positive definite matrix, by Cholesky's factors.
///
/// # Errors
/// [`Error::Factorisation`] when it is not positive definite.
pub(crate) fn inverse(matrix: &Array2<f64>, what: &'static str) -> Result<Array2<f64>, Error> {
    let order = matrix.nrows();
    let failed = || Error::Factorisation {
        what,
        images: order,
    };
    let values = matrix.as_slice().ok_or_else(failed)?;
    let factors = MatRef::from_row_major_slice(values, order, order)
        .llt(Side::Lower)
        .map_err(|_| failed())?;
    let inverse = factors.inverse();
    Ok(Array2::from_shape_fn((order, order), |(i, j)| {
        inverse[(i, j)]
    }))
}

/// The solution `x` of `matrix x = right` for a symmetric positive definite matrix.
///
/// # Errors
/// [`Error::Factorisation`] when it is not positive definite.
pub(crate) fn solve(
    matrix: &Array2<f64>,
    right: &Array1<f64>,
    what: &'static str,
) -> Result<Array1<f64>, Error> {
    let order = matrix.nrows();
    let failed = || Error::Factorisation {
        what,
        images: order,
    };
    let (values, right) = (matrix.as_slice().ok_or_else(failed)?, right.to_vec());
    let factors = MatRef::from_row_major_slice(values, order, order)
        .llt(Side::Lower)
        .map_err(|_| failed())?;
    let solution = factors.solve(MatRef::from_column_major_slice(&right, order, 1));
    Ok(Array1::from_shape_fn(order, |i| solution[(i, 0)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_match_double_precision() {
        for i in 0..=8700 {
            let x = -0.01 * i as f32;
            let expected = f64::from(x).exp();
            assert!(
                (f64::from(exp_of_negative(x)) / expected - 1.0).abs() < 2e-7,
                "{x}"
            );
        }
        assert_eq!(exp_of_negative(0.0), 1.0);
        assert_eq!(exp_of_negative(-1e9), exp_of_negative(-87.0));
    }
    use ndarray::Array2;

    fn matrix(rows: usize, columns: usize) -> Array2<f64> {
        Array2::from_shape_fn((rows, columns), |(i, j)| ((i * 31 + j * 17) as f64).sin())
    }

    #[test]
    fn products_are_ndarrays_own() {
        let (a, b) = (matrix(70, 33), matrix(41, 33));
        let difference = product(a.view(), b.view()) - a.dot(&b.t());
        assert!(difference.iter().all(|d| d.abs() < 1e-12));
        // A view with gaps.
        let every = a.slice(ndarray::s![..;2, ..]);
        let difference = product(every, b.view()) - every.dot(&b.t());
        assert!(difference.iter().all(|d| d.abs() < 1e-12));
        assert_eq!(product(a.view(), matrix(0, 33).view()).dim(), (70, 0));
    }

    /// A row of a product is the same however many other rows there are, and on any number of threads.
    #[test]
    fn rows_do_not_depend_on_the_batch() {
        let (a, b) = (matrix(600, 576), matrix(300, 576));
        rows_alone(&a.mapv(|v| v as f32), &b.mapv(|v| v as f32));
        rows_alone(&a, &b);
        for columns in [1, 2, 5, 9, 31] {
            rows_alone(&a, &b.slice(s![..columns, ..]).to_owned());
            // As many channels as columns, as in products with a kernel's inverse.
            rows_alone(
                &a.slice(s![.., ..columns]).to_owned(),
                &matrix(columns, columns),
            );
        }
    }

    fn rows_alone<T: ComplexField + Copy + Send + Sync>(a: &Array2<T>, b: &Array2<T>) {
        let whole = product(a.view(), b.view());
        for rows in [1, 2, 7, 16, 33, 100] {
            let part = product(a.slice(ndarray::s![..rows, ..]), b.view());
            assert!(part == whole.slice(ndarray::s![..rows, ..]), "{rows} rows");
        }
        for threads in [1, 2, 7] {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            assert_eq!(
                pool.install(|| product(a.view(), b.view())),
                whole,
                "{threads} threads"
            );
        }
    }

    #[test]
    fn inverses_are_symmetric_and_undo_the_matrix() {
        let a = matrix(50, 20);
        let spd = product(a.view(), a.view()) + Array2::<f64>::eye(50);
        let inverse = inverse(&spd, "kernel").unwrap();
        let difference = inverse.dot(&spd) - Array2::<f64>::eye(50);
        assert!(difference.iter().all(|d| d.abs() < 1e-10));
        let right = Array1::from_shape_fn(50, |i| (i as f64).cos());
        let solution = solve(&spd, &right, "kernel").unwrap();
        let difference = solution - inverse.dot(&right);
        assert!(difference.iter().all(|d| d.abs() < 1e-10));
        let asymmetric = &inverse - &inverse.t();
        assert!(asymmetric.iter().all(|d| *d == 0.0));
        assert!(super::inverse(&(-spd), "kernel").is_err());
    }
}
