//! Patch tokens of the backbone's middle, which know more of texture and place than the last block's.

use candle_core::{D, Tensor};
use defend_core::Error;
use defend_core::vit::Features;

/// The two blocks at one and two thirds of the depth, counted back from the last: 8 and 4 of 12 blocks.
fn offsets(depth: usize) -> [usize; 2] {
    let first = depth.saturating_sub(1);
    [depth - depth / 3, depth - 2 * depth / 3].map(|offset| offset.min(first))
}

/// Layers that the features need for [`middle_patches`].
pub(crate) fn layers_needed(depth: usize) -> usize {
    offsets(depth)[0] + 1
}

/// Patch tokens of both blocks, joined: `[B, N, 2 D]`.
pub(crate) fn middle_patches(features: &Features, depth: usize) -> Result<Tensor, Error> {
    let block = |offset: usize| match offset {
        0 => Some(&features.patches),
        _ => features
            .intermediates
            .get(offset - 1)
            .map(|layer| &layer.patches),
    };
    let blocks: Vec<&Tensor> = offsets(depth).into_iter().filter_map(block).collect();
    Ok(Tensor::cat(&blocks, D::Minus1)?)
}
