//! Rows of a table.

use candle_core::{Result, Tensor};

/// Picks rows: `table` `[N, D]`, `at` `[R]` of `u32` below N; returns `[R, D]`. Differentiable with respect to the table.
///
/// As candle's `index_select`, whose backward pass on a CUDA device takes longer than a block of a transformer.
///
/// # Errors
/// When the shapes do not fit.
pub fn pick_rows(table: &Tensor, at: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if crate::cuda::takes(table)
        && table.track_op()
        && table.dims2()?.1 <= crate::cuda::rows::MOST_SCATTERED
        && at.dtype() == candle_core::DType::U32
    {
        use super::cuda::{Picked, Precomputed};
        let at = crate::cuda::aligned(at)?;
        let out = table.detach().index_select(&at, 0)?;
        return table.apply_op1(Precomputed::new("pick-rows", out, Picked(at)));
    }
    table.index_select(at, 0)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradients, noise};
    use super::*;
    use candle_core::Device;

    #[test]
    fn gradients_match_finite_differences() {
        let at = Tensor::new(&[3u32, 0, 3, 1], &Device::Cpu).unwrap();
        check_gradients(&[noise(&[5, 8], 1)], |t| pick_rows(&t[0], &at));
    }
}
