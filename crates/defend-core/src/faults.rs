//! Patches of known faulty images.

use std::sync::Arc;

use candle_core::Device;
use defend_data::{Dataset, GrayImage, Preprocess, RgbImage};
use defend_evidence::PatchTokens;
use defend_vit::{Encoder, Grid, ImageSource};

use crate::normals::Normals;
use crate::observer::Observer;
use crate::tokens::TokenBlocks;
use crate::{Error, ResizedImages};

/// Limit of the memory for resized images.
const IMAGE_BYTES: usize = 256 << 20;
/// Share of a patch under the mask from which it is faulty.
const LEAST_SHARE: f64 = 0.1;

/// Faulty patches of an image, where they are known.
type Marked = Option<Vec<usize>>;

/// Known faulty images, and how they are prepared.
pub(crate) struct Faulty<'a> {
    pub(crate) images: &'a Arc<dyn Dataset>,
    pub(crate) preprocess: &'a Preprocess,
    pub(crate) device: &'a Device,
    pub(crate) strict: bool,
}

impl Faulty<'_> {
    /// Their patches, and which of each are faulty, where that is known; of at most `limit` images.
    pub(crate) fn look(
        &self,
        teacher: &dyn Encoder,
        blocks: &TokenBlocks,
        limit: usize,
        observer: &mut dyn Observer,
    ) -> Result<(PatchTokens, Vec<Marked>), Error> {
        let images = ResizedImages::read(
            Arc::clone(self.images),
            self.preprocess.clone(),
            self.device,
            IMAGE_BYTES,
            self.strict,
            observer,
        )?;
        let count = images.len().min(limit);
        let some: Vec<usize> = (0..count).map(|i| i * images.len() / count).collect();
        let tokens = Normals::new(teacher, blocks, &images).patches(&some, observer)?;
        let grid = blocks.grid(teacher);
        let marked = some.iter().map(|&image| {
            let Some(index) = images.index(image) else {
                return Ok(None);
            };
            let mask = self.images.mask(index)?;
            mask.map(|mask| self.under(&mask, grid)).transpose()
        });
        Ok((tokens, marked.collect::<Result<_, Error>>()?))
    }

    /// Patches that lie under the white of a mask; none where nothing is white in what is looked at.
    fn under(&self, mask: &GrayImage, grid: Grid) -> Result<Vec<usize>, Error> {
        let white = RgbImage::from_fn(mask.width(), mask.height(), |x, y| {
            let white = mask.get_pixel(x, y).0[0] > 0;
            [if white { 255 } else { 0 }; 3].into()
        });
        // What lies outside a region of interest is black then.
        let preprocess = Preprocess {
            mean: [0.0; 3],
            ..self.preprocess.clone()
        };
        let white = preprocess.resize(&white)?;
        let side = (white.width() as usize / grid.columns.max(1)).max(1);
        let mut sums = vec![0.0; grid.patches()];
        for (x, y, pixel) in white.enumerate_pixels() {
            let at = y as usize / side * grid.columns + x as usize / side;
            if let Some(sum) = sums.get_mut(at) {
                *sum += f64::from(pixel.0[0]);
            }
        }
        let largest = sums.iter().copied().fold(0.0, f64::max);
        // A fault that is smaller than that is in the patch that has most of it.
        let least = (LEAST_SHARE * 255.0 * (side * side) as f64).min(largest);
        let faulty = sums
            .iter()
            .enumerate()
            .filter(|(_, sum)| **sum > 0.0 && **sum >= least);
        Ok(faulty.map(|(patch, _)| patch).collect())
    }
}
