//! Matrix products on strided `f32` views: a checked front for the `gemm` crate.

use gemm::Parallelism;

/// A read-only matrix over a slice: element `(r, c)` is `data[r * row_stride + c * column_stride]`.
#[derive(Clone, Copy)]
pub(crate) struct MatRef<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> MatRef<'a> {
    /// A row-major matrix whose rows start `row_stride` elements apart.
    pub(crate) fn strided(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(rows > 0 && columns > 0 && row_stride >= columns);
        assert!((rows - 1) * row_stride + columns <= data.len());
        Self {
            data,
            rows,
            columns,
            row_stride,
            column_stride: 1,
        }
    }

    /// A row-major matrix without gaps.
    pub(crate) fn dense(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    /// The same elements with rows and columns exchanged.
    pub(crate) fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// What happens to the destination's old content.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    /// It is overwritten.
    Overwrite,
    /// The product is added to it.
    Accumulate,
}

/// `destination = [destination +] factor * left * right`, rows of the destination `row_stride` apart.
///
/// `threads` above one splits the product over the rayon pool; the split never runs along the inner
/// dimension, so the result does not depend on it.
pub(crate) fn product(
    destination: &mut [f32],
    row_stride: usize,
    mode: Into,
    left: MatRef<'_>,
    right: MatRef<'_>,
    factor: f32,
    threads: usize,
) {
    let (m, n, k) = (left.rows, right.columns, left.columns);
    assert_eq!(k, right.rows, "inner dimensions differ");
    assert!(row_stride >= n && (m - 1) * row_stride + n <= destination.len());
    let parallelism = if threads > 1 {
        Parallelism::Rayon(threads)
    } else {
        Parallelism::None
    };
    // SAFETY: `gemm` reads rows x columns elements of both operands and reads or writes m x n elements
    // of the destination, at the given strides. The constructors of `MatRef` and the assertions above
    // prove that the last of them lies inside each slice (transposing swaps extents with their strides
    // and keeps the last element), strides are non-negative, `destination` is borrowed exclusively, so it
    // cannot overlap the operands, and all three slices are initialised f32 memory.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            destination.as_mut_ptr(),
            1,
            row_stride as isize,
            mode == Into::Accumulate,
            left.data.as_ptr(),
            left.column_stride as isize,
            left.row_stride as isize,
            right.data.as_ptr(),
            right.column_stride as isize,
            right.row_stride as isize,
            1.0,
            factor,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// `out = x W^T + b` for the rows of `x`; weight `[O, I]`, bias `[O]`.
pub(crate) fn affine(out: &mut [f32], x: &[f32], [weight, bias]: [&[f32]; 2], threads: usize) {
    let (outputs, inputs) = (bias.len(), weight.len() / bias.len());
    for row in out.chunks_exact_mut(outputs) {
        row.copy_from_slice(bias);
    }
    let x = MatRef::dense(x, x.len() / inputs, inputs);
    let weight = MatRef::dense(weight, outputs, inputs).transposed();
    product(out, outputs, Into::Accumulate, x, weight, 1.0, threads);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strided_transposed_and_accumulated_products_match_loops() {
        let a: Vec<f32> = (0..5 * 7).map(|i| (i % 11) as f32 - 4.0).collect();
        let b: Vec<f32> = (0..6 * 7).map(|i| (i % 13) as f32 - 6.0).collect();
        // Uses columns 1..5 of both: [5, 4] * [6, 4]^T, into columns of a wider destination.
        let mut c = vec![1f32; 5 * 9];
        product(
            &mut c,
            9,
            Into::Accumulate,
            MatRef::strided(&a[1..], 5, 4, 7),
            MatRef::strided(&b[1..], 6, 4, 7).transposed(),
            0.5,
            1,
        );
        for i in 0..5 {
            for j in 0..9 {
                let dot: f32 = (1..5).map(|l| a[i * 7 + l] * b[(j % 6) * 7 + l]).sum();
                let want = if j < 6 { 1.0 + 0.5 * dot } else { 1.0 };
                assert!((c[i * 9 + j] - want).abs() < 1e-5);
            }
        }
    }

    #[test]
    #[should_panic(expected = "assertion")]
    fn a_view_beyond_its_slice_is_refused() {
        MatRef::strided(&[0.0; 10], 3, 4, 4);
    }

    #[test]
    fn threads_do_not_change_the_result() {
        let a: Vec<f32> = (0..300 * 200)
            .map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0)
            .collect();
        let b: Vec<f32> = (0..200 * 150)
            .map(|i| ((i * 53) % 97) as f32 / 48.0 - 1.0)
            .collect();
        let run = |threads| {
            let mut c = vec![0f32; 300 * 150];
            product(
                &mut c,
                150,
                Into::Overwrite,
                MatRef::dense(&a, 300, 200),
                MatRef::dense(&b, 200, 150),
                1.0,
                threads,
            );
            c
        };
        assert_eq!(run(1), run(2));
    }
}
