//! Images to patch vectors.

use candle_core::{DType, Result, Storage, Tensor, bail};
use rayon::prelude::*;

/// Cuts images into flattened patches of `side` x `side` pixels, values in the order of a convolution kernel (channel, row,
/// column).
///
/// `images`: `[B, 3, H, W]` with sides that are multiples of `side`; `which`: `[B, M]` of `u32`, positions in the grid of
/// patches, row-major, below `H W / side^2`; returns `[B, M, 3 side^2]`, or all N patches of every image without `which`.
/// Differentiable with respect to the images.
///
/// # Errors
/// When the shapes do not fit.
pub fn patches(images: &Tensor, side: usize, which: Option<&Tensor>) -> Result<Tensor> {
    let (b, channels, height, width) = images.dims4()?;
    if channels != 3 || side == 0 || height % side + width % side != 0 || images.elem_count() == 0 {
        bail!(
            "patches: images {:?} are not 3 channels of sides that are multiples of {side}",
            images.dims()
        )
    }
    if let Some(which) = which
        && (which.dims2()?.0 != b || which.dtype() != DType::U32 || which.elem_count() == 0)
    {
        bail!(
            "patches: positions {:?} of {:?} for {b} images",
            which.dims(),
            which.dtype()
        )
    }
    if super::is_fast(&[images]) && images.is_contiguous() && !images.track_op() {
        return copied(images, side, which);
    }
    #[cfg(feature = "cuda")]
    if images.device().is_cuda()
        && matches!(images.dtype(), DType::F32 | DType::BF16 | DType::F16)
        && !images.track_op()
    {
        use defend_cuda_kernels::aligned;
        let which = which.map(aligned).transpose()?;
        return defend_cuda_kernels::rows::patches(&aligned(images)?, side, which.as_ref());
    }
    let (rows, columns) = (height / side, width / side);
    let all = images
        .reshape((b, 3, rows, side, columns, side))?
        .permute((0, 2, 4, 1, 3, 5))?
        .reshape((b, rows * columns, 3 * side * side))?;
    match which {
        Some(which) => super::pick_of_each(&all, which),
        None => Ok(all),
    }
}

/// The same in one parallel copy of what is kept.
fn copied(images: &Tensor, side: usize, which: Option<&Tensor>) -> Result<Tensor> {
    let (b, _, height, width) = images.dims4()?;
    let (columns, n) = (width / side, height / side * (width / side));
    let kept: Vec<u32> = match which {
        Some(which) => which.flatten_all()?.to_vec1()?,
        None => (0..b).flat_map(|_| 0..n as u32).collect(),
    };
    if let Some(at) = kept.iter().find(|&&at| at as usize >= n) {
        bail!("patches: position {at} in a grid of {n}")
    }
    let (storage, layout) = images.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        bail!("patches: the pixels of a CPU tensor are on another device")
    };
    let pixels = &storage.as_slice::<f32>()?[layout.start_offset()..];
    let values = 3 * side * side;
    let each = kept.len() / b;
    let mut out = vec![0f32; kept.len() * values];
    out.par_chunks_mut(values)
        .zip(&kept)
        .enumerate()
        .for_each(|(i, (out, &at))| {
            let at = at as usize;
            let (row, column) = (at / columns * side, at % columns * side);
            for (line, out) in out.chunks_exact_mut(side).enumerate() {
                let (channel, y) = (line / side, row + line % side);
                let start = ((i / each * 3 + channel) * height + y) * width + column;
                out.copy_from_slice(&pixels[start..start + side]);
            }
        });
    super::from_vec(out, (b, each, values))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradients, distance, noise};
    use super::*;
    use candle_core::Device;

    fn which() -> Tensor {
        Tensor::new(&[[4u32, 1], [0, 5]], &Device::Cpu).unwrap()
    }

    #[test]
    fn the_copy_equals_the_permutation() -> Result<()> {
        let images = noise(&[2, 3, 8, 12], 1);
        for which in [None, Some(&which())] {
            let copied = patches(&images, 4, which)?;
            let permuted = patches(&images.to_dtype(DType::F64)?, 4, which)?;
            assert_eq!(distance(&copied, &permuted), 0.0);
        }
        Ok(())
    }

    #[test]
    fn gradients_match_finite_differences() {
        for which in [None, Some(&which())] {
            check_gradients(&[noise(&[2, 3, 8, 12], 1)], |t| patches(&t[0], 4, which));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let images = noise(&[2, 3, 8, 12], 1);
        assert!(patches(&images, 5, None).is_err());
        assert!(patches(&images, 4, Some(&which().narrow(0, 0, 1).unwrap())).is_err());
        let beyond = Tensor::new(&[[6u32], [0]], &Device::Cpu).unwrap();
        assert!(patches(&images, 4, Some(&beyond)).is_err());
    }
}
