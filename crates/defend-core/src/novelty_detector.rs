//! What everything that scores images has in common.

use candle_core::{Device, Tensor};
use defend_data::Preprocess;

use crate::{Error, Novelty};

/// Role: anything that scores images, larger for more novel.
///
/// ```
/// use defend_core::data::{Memory, Preprocess, RgbImage};
/// use defend_core::prelude::*;
/// use defend_core::{Error, Novelty, Tensor};
///
/// /// The brighter, the more novel.
/// struct Bright(Preprocess);
///
/// impl NoveltyDetector for Bright {
///     fn preprocess(&self) -> &Preprocess {
///         &self.0
///     }
///
///     fn device(&self) -> &Device {
///         &Device::Cpu
///     }
///
///     fn score(&self, images: &Tensor) -> Result<Vec<Novelty>, Error> {
///         let means = images.mean((1, 2, 3))?.to_vec1::<f32>()?;
///         Ok(means.into_iter().map(|mean| Novelty::of_score(f64::from(mean))).collect())
///     }
/// }
///
/// let mut images = Memory::default();
/// images.push("dark", RgbImage::new(20, 20), vec![]);
/// images.push("light", RgbImage::from_pixel(20, 20, [255; 3].into()), vec![]);
/// let detector = Bright(Preprocess::new(16, [0.0; 3], [1.0; 3]));
/// let scores = scan(&detector, images, &mut Silent)?.scores();
/// assert!(scores[1] > scores[0]);
/// # Ok::<(), Error>(())
/// ```
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
