//! Attention of tokens that see the places of a grid around them.

use candle_core::{D, Result, Tensor, bail};
use rayon::prelude::*;

use super::{from_vec, is_fast, with_slices};
use defend_kernels::local::Local;

/// One token at each place of a grid attends to itself and to the places up to `reach` rows and columns away.
///
/// `own`: the tokens' packed queries, keys and values, `[B, N, 3 D]`; `seen`: keys and values of the places, `[B, N, 2 D]`, each
/// split into `heads`; `grid`: rows and columns, N of them in all. Returns `[B, N, D]`, without a gradient.
///
/// # Errors
/// When the shapes do not fit each other.
pub fn local_attention(
    own: &Tensor,
    seen: &Tensor,
    heads: usize,
    grid: [usize; 2],
    reach: usize,
) -> Result<Tensor> {
    let (b, n, packed) = own.dims3()?;
    let width = packed / 3;
    let [rows, columns] = grid;
    if heads == 0 || packed % (3 * heads) != 0 || n != rows * columns {
        bail!(
            "local attention: shape {:?} does not fit {heads} heads on {rows} x {columns} places",
            own.dims()
        )
    }
    if seen.dims() != [b, n, 2 * width] {
        bail!(
            "local attention: keys and values are {:?}, expected {:?}",
            seen.dims(),
            [b, n, 2 * width]
        )
    }
    let local = Local {
        grid,
        reach,
        width,
        heads,
    };
    let (own, seen) = (own.detach(), seen.detach());
    if !is_fast(&[&own, &seen]) {
        return composed(&own, &seen, local);
    }
    with_slices("local attention", [&own, &seen], |[own, seen]| {
        let mut out = vec![0f32; b * n * width];
        let images = out
            .par_chunks_mut(n * width)
            .zip(own.par_chunks(n * packed))
            .zip(seen.par_chunks(n * 2 * width));
        images.for_each(|((out, own), seen)| local.attend(out, own, seen));
        from_vec(out, (b, n, width))
    })
}

/// The same in candle's operations: attention to all places, those out of reach masked.
fn composed(own: &Tensor, seen: &Tensor, local: Local) -> Result<Tensor> {
    let Local { heads, width, .. } = local;
    let (b, n, _) = own.dims3()?;
    let d = width / heads;
    // The part of a packed tensor that holds queries, keys or values, `[B, h, N, d]`.
    let part = |packed: &Tensor, at: usize| {
        let part = packed.narrow(2, at * width, width)?.contiguous()?;
        part.reshape((b, n, heads, d))?
            .transpose(1, 2)?
            .contiguous()
    };
    let scale = 1.0 / (d as f64).sqrt();
    let query = part(own, 0)?;
    let to_itself = ((&query * part(own, 1)?)?.sum_keepdim(D::Minus1)? * scale)?;
    let mask = mask(local).and_then(|mask| mask.to_device(own.device())?.to_dtype(own.dtype()))?;
    let to_places = (query.matmul(&part(seen, 0)?.t()?)? * scale)?.broadcast_add(&mask)?;
    let weights =
        candle_nn::ops::softmax(&Tensor::cat(&[to_itself, to_places], D::Minus1)?, D::Minus1)?;
    let of_itself = part(own, 2)?.broadcast_mul(&weights.narrow(3, 0, 1)?)?;
    let of_places = weights
        .narrow(3, 1, n)?
        .contiguous()?
        .matmul(&part(seen, 1)?)?;
    (of_itself + of_places)?
        .transpose(1, 2)?
        .contiguous()?
        .reshape((b, n, width))
}

/// `[N, N]`, 0 for a place within reach of another one and -inf elsewhere.
fn mask(local: Local) -> Result<Tensor> {
    let [rows, columns] = local.grid;
    let n = local.places();
    let mut values = vec![f32::NEG_INFINITY; n * n];
    for (place, line) in values.chunks_exact_mut(n.max(1)).enumerate() {
        for row in local.around(place / columns, rows) {
            for column in local.around(place % columns, columns) {
                line[row * columns + column] = 0.0;
            }
        }
    }
    from_vec(values, (n, n))
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::super::attention;
    use super::super::testing::{distance, noise};
    use super::*;

    #[test]
    fn the_kernel_is_the_composition() -> Result<()> {
        for (grid, reach) in [([3, 5], 1), ([4, 4], 2), ([1, 6], 0), ([2, 3], 9)] {
            let n = grid[0] * grid[1];
            let (own, seen) = (noise(&[2, n, 3 * 24], 1), noise(&[2, n, 2 * 24], 2));
            let (own, seen) = ((own * 4.0)?, (seen * 4.0)?);
            let found = local_attention(&own, &seen, 3, grid, reach)?;
            let wide = [&own, &seen].map(|t| t.to_dtype(DType::F64));
            let [own, seen] = wide;
            let expected = local_attention(&own?, &seen?, 3, grid, reach)?;
            assert!(distance(&found, &expected) < 1e-5, "{grid:?} {reach}");
        }
        Ok(())
    }

    /// A token beside which nothing but itself is seen, with a key and value of its own among the places.
    #[test]
    fn without_reach_two_keys_are_left() -> Result<()> {
        let (own, seen) = (noise(&[1, 1, 3 * 8], 3), noise(&[1, 1, 2 * 8], 4));
        let found = local_attention(&own, &seen, 2, [1, 1], 0)?;
        // Attention of two tokens, of which the second one's query does not matter.
        let place = Tensor::cat(&[noise(&[1, 1, 8], 5), seen], 2)?;
        let both = attention(&Tensor::cat(&[own, place], 1)?, 2)?;
        assert!(distance(&found, &both.narrow(1, 0, 1)?) < 1e-6);
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let (own, seen) = (noise(&[1, 6, 24], 1), noise(&[1, 6, 16], 2));
        assert!(local_attention(&own, &seen, 2, [2, 3], 1).is_ok());
        assert!(local_attention(&own, &seen, 3, [2, 3], 1).is_err());
        assert!(local_attention(&own, &seen, 2, [2, 2], 1).is_err());
        assert!(local_attention(&own, &own, 2, [2, 3], 1).is_err());
    }
}
