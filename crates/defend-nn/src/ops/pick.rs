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
    if defend_cuda_kernels::takes(table)
        && table.track_op()
        && table.dims2()?.1 <= defend_cuda_kernels::rows::MOST_SCATTERED
        && at.dtype() == candle_core::DType::U32
    {
        use super::cuda::{Picked, Precomputed};
        let at = defend_cuda_kernels::aligned(at)?;
        let out = table.detach().index_select(&at, 0)?;
        return table.apply_op1(Precomputed::new("pick-rows", out, Picked(at)));
    }
    table.index_select(at, 0)
}

/// Picks rows of each image: `tokens` `[B, N, D]`, `at` `[B, M]` of `u32` below N; returns `[B, M, D]`. Differentiable with
/// respect to the tokens.
///
/// # Errors
/// When the shapes do not fit.
pub fn pick_of_each(tokens: &Tensor, at: &Tensor) -> Result<Tensor> {
    let ((b, n, d), kept) = (tokens.dims3()?, at.dim(1)?);
    let offsets = (Tensor::arange(0u32, b as u32, tokens.device())? * n as f64)?;
    let rows = at.broadcast_add(&offsets.unsqueeze(1)?)?.flatten_all()?;
    let flat = tokens.reshape((b * n, d))?;
    flat.index_select(&rows, 0)?.reshape((b, kept, d))
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
