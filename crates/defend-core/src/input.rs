//! From images to a network's input.

use candle_core::{Device, Tensor};
use defend_data::{Interpolation, Preprocess, RgbImage};
use defend_vit::BackboneSpec;
use rayon::prelude::*;

use crate::tiles::Tiling;
use crate::{DefendConfig, Error};

/// The preprocessing that belongs to a backbone.
pub fn preprocess_of(spec: &BackboneSpec, resize_mode: defend_data::ResizeMode) -> Preprocess {
    let normalization = spec.normalization;
    let size = u32::try_from(spec.architecture.image_size).unwrap_or(u32::MAX);
    Preprocess {
        resize_mode,
        filter: match spec.interpolation {
            defend_vit::Interpolation::Bilinear => Interpolation::Bilinear,
            defend_vit::Interpolation::Bicubic => Interpolation::Bicubic,
        },
        ..Preprocess::new(size, normalization.mean, normalization.std)
    }
}

/// Longest side of all tiles together, pixels.
const LARGEST_INPUT: usize = 4096;

/// The tiles that settings ask for.
pub(crate) fn tiling_of(spec: &BackboneSpec, config: &DefendConfig) -> Option<Tiling> {
    let teacher = &spec.architecture;
    let tiles = config.tiles?;
    Some(tiles.of_side(teacher.image_size, teacher.patch_size))
}

/// The preprocessing that a backbone and settings ask for.
///
/// # Errors
/// [`Error::Config`] for more tiles than an input holds.
pub(crate) fn preprocess_for(
    spec: &BackboneSpec,
    config: &DefendConfig,
) -> Result<Preprocess, Error> {
    let preprocess = Preprocess {
        region: config.region.clone(),
        reduced_decoding: config.reduced_decoding,
        ..preprocess_of(spec, config.resize_mode)
    };
    let Some(tiling) = tiling_of(spec, config) else {
        return Ok(preprocess);
    };
    let pixels = |side: usize| u32::try_from(side).unwrap_or(u32::MAX);
    let (width, height) = tiling.input_size();
    if width.max(height) > LARGEST_INPUT {
        return Err(Error::Config {
            field: "tiles",
            value: format!("{width} x {height} px together"),
            expected: format!(
                "at most {LARGEST_INPUT} px a side: fewer tiles or a smaller image size"
            ),
        });
    }
    Ok(Preprocess {
        size: pixels(width),
        height: (height != width).then(|| pixels(height)),
        smallest: Some(pixels(tiling.side())),
        ..preprocess
    })
}

/// Normalised images as a tensor `[B, 3, height, width]`.
pub(crate) fn to_tensor(
    images: &[RgbImage],
    preprocess: &Preprocess,
    device: &Device,
) -> Result<Tensor, Error> {
    let (width, height) = preprocess.input_size();
    let length = preprocess.input_len();
    let mut values = vec![0f32; images.len() * length];
    values
        .par_chunks_mut(length)
        .zip(images)
        .try_for_each(|(target, image)| preprocess.normalize_into(image, target))?;
    Ok(Tensor::from_vec(
        values,
        (images.len(), 3, height as usize, width as usize),
        device,
    )?)
}
