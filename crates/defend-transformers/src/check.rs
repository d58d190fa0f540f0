//! What all models refuse.

use candle_core::Tensor;
use defend_vit::{BackboneSpec, Error};

/// Refuses images of another size than the model's, which candle's types would panic on, and blocks that there are not.
pub(crate) fn check(
    spec: &BackboneSpec,
    available: &[usize],
    images: &Tensor,
    blocks: &[usize],
) -> Result<(), Error> {
    let side = spec.architecture.image_size;
    let config = |reason| Error::Config {
        origin: spec.name.clone(),
        reason,
    };
    if !matches!(images.dims(), &[_, 3, h, w] if h == side && w == side) {
        return Err(config(format!(
            "images of shape {:?}, expected [B, 3, {side}, {side}]",
            images.dims()
        )));
    }
    let ascending = blocks.is_sorted_by(|a, b| a < b);
    if !ascending || blocks.iter().any(|block| !available.contains(block)) {
        return Err(config(format!(
            "the blocks {blocks:?} were asked for, expected ascending ones among {available:?}"
        )));
    }
    Ok(())
}

/// Runs images one by one: several of candle's types take no more at a time.
pub(crate) fn each_image(
    images: &Tensor,
    run: impl Fn(&Tensor) -> Result<Tensor, Error>,
) -> Result<Tensor, Error> {
    let all = (0..images.dim(0)?).map(|i| run(&images.narrow(0, i, 1)?));
    Ok(Tensor::cat(&all.collect::<Result<Vec<_>, Error>>()?, 0)?)
}
