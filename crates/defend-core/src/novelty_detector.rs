//! What everything that scores images has in common.

use candle_core::{Device, Tensor};
use defend_data::Preprocess;

use crate::{Error, Novelty};

/// Role: anything that scores images, larger for more novel.
pub trait NoveltyDetector: Send + Sync {
    /// How images are prepared for [`NoveltyDetector::score`].
    fn preprocess(&self) -> &Preprocess;

    /// Where the images have to be.
    fn device(&self) -> &Device;

    /// Images a forward pass.
    fn batch_size(&self) -> usize {
        32
    }

    /// One result an image; `images`: `[B, 3, H, W]`, prepared as [`NoveltyDetector::preprocess`] says. Maps are among the
    /// results where they cost nothing.
    ///
    /// # Errors
    /// When the images do not fit.
    fn score(&self, images: &Tensor) -> Result<Vec<Novelty>, Error>;

    /// As [`NoveltyDetector::score`], with maps where the detector has them at all.
    ///
    /// # Errors
    /// When the images do not fit.
    fn score_with_maps(&self, images: &Tensor) -> Result<Vec<Novelty>, Error> {
        self.score(images)
    }
}
