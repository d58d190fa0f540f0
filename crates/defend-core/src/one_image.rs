//! Scoring an image that is in memory.

use defend_data::RgbImage;

use crate::input::to_tensor;
use crate::{Detector, Error, Novelty, NoveltyDetector};

impl Detector {
    /// Scores one image as [`scan()`](crate::scan()) scores a file, to the same bits but for large JPEGs, which are decoded at a part of
    /// their size ([`DefendConfig::reduced_decoding`](crate::DefendConfig::reduced_decoding)). There is a map where it costs nothing.
    ///
    /// # Errors
    /// [`Error::Data`] for an image that cannot be resized as the detector wants it; [`Error::NonFiniteScore`].
    pub fn score_image(&self, image: &RgbImage) -> Result<Novelty, Error> {
        self.score_resized(&self.preprocess.resize(image)?, "the image")
    }

    /// As [`Detector::score_image`], from the bytes of an image file, to the same bits as [`scan()`](crate::scan()); `name` is for
    /// errors.
    ///
    /// # Errors
    /// [`Error::Data`] for bytes that are no image; as [`Detector::score_image`].
    pub fn score_encoded(&self, bytes: &[u8], name: &str) -> Result<Novelty, Error> {
        self.score_resized(&self.preprocess.decode(bytes, name)?, name)
    }

    fn score_resized(&self, image: &RgbImage, name: &str) -> Result<Novelty, Error> {
        let images = std::slice::from_ref(image);
        let tensor = to_tensor(images, &self.preprocess, &self.device)?;
        let named = |_: usize| name.to_owned();
        let novelties = self.score(&tensor).map_err(|error| error.naming(named))?;
        let Some(novelty) = novelties.into_iter().next() else {
            return Err(Error::no_images(1, &[]));
        };
        if !novelty.score.is_finite() {
            return Err(Error::NonFiniteScore {
                name: name.to_owned(),
                score: novelty.score,
            });
        }
        Ok(novelty)
    }
}
