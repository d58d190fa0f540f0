//! Normal images that come one by one.

use std::sync::Arc;

use candle_core::Device;
use defend_data::{Preprocess, RgbImage, content_hash};
use defend_evidence::Embeddings;
use defend_vit::Encoder;

use crate::input::to_tensor;
use crate::normal_images::{NormalImage, thumbnail};
use crate::tokens::{TokenBlocks, Wanted};
use crate::{Detector, Error, Learnt};

/// Normal images that a detector is to learn, gathered one by one as a camera gives them: each costs a pass of the teacher, and
/// all of them one refit ([`Detector::learn_additions`]).
///
/// ```no_run
/// use defend_core::data::read_image;
/// use defend_core::prelude::*;
///
/// let mut detector = Detector::load("line.defend", &best_device())?;
/// let mut additions = detector.additions()?;
/// for path in ["confirmed/17.jpg", "confirmed/18.jpg"] {
///     additions.add(path, &read_image(path)?)?;
/// }
/// detector.learn_additions(&additions)?;
/// # Ok::<(), defend_core::Error>(())
/// ```
pub struct Additions {
    teacher: Arc<dyn Encoder>,
    blocks: TokenBlocks,
    preprocess: Preprocess,
    device: Device,
    images: Vec<NormalImage>,
    thumbnails: bool,
    embeddings: Vec<Embeddings>,
}

impl Additions {
    /// Looks at an image. A failure leaves those that were added before.
    ///
    /// # Errors
    /// [`Error::Data`] for an image that cannot be used; [`Error::NonFiniteFeatures`].
    pub fn add(&mut self, name: impl Into<String>, image: &RgbImage) -> Result<(), Error> {
        let name = name.into();
        let resized = self.preprocess.resize(image)?;
        let hash = content_hash(&resized);
        let images = to_tensor(&[resized], &self.preprocess, &self.device)?;
        let embedded = self
            .blocks
            .embed(&*self.teacher, &images, Wanted::default());
        let embedded = embedded.map_err(|error| error.naming(|_| name.clone()))?;
        self.embeddings.push(embedded.images);
        self.images.push(NormalImage {
            name,
            hash: Some(hash),
            thumbnail: self.thumbnails.then(|| thumbnail(image)).flatten(),
        });
        Ok(())
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.images.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.images.is_empty()
    }
}

impl Detector {
    /// Gathers normal images one by one, for [`Detector::learn_additions`].
    ///
    /// # Errors
    /// [`Error::Config`] for a masked student; [`Error::Evidence`] for a model that cannot learn on without its images, which
    /// [`Detector::learn_normal`] refuses too.
    pub fn additions(&self) -> Result<Additions, Error> {
        let closed = self.closed_form()?;
        closed.evidence.can_be_refitted()?;
        Ok(Additions {
            teacher: Arc::clone(&closed.teacher),
            blocks: closed.blocks.clone(),
            preprocess: self.preprocess.clone(),
            device: self.device.clone(),
            images: Vec::new(),
            thumbnails: self.has_thumbnails(),
            embeddings: Vec::new(),
        })
    }

    /// Learns normal images that were gathered one by one, as [`Detector::learn_normal`] learns a data set.
    ///
    /// A failure leaves the detector as it was, and the images are still there.
    ///
    /// # Errors
    /// [`Error::Config`] for images that were gathered for another detector; as [`Detector::learn_normal`].
    pub fn learn_additions(&mut self, additions: &Additions) -> Result<Learnt, Error> {
        let closed = self.closed_form()?;
        let same = Arc::ptr_eq(&closed.teacher, &additions.teacher)
            && closed.blocks == additions.blocks
            && self.preprocess == additions.preprocess;
        if !same {
            return Err(Error::Config {
                field: "additions",
                value: "those of another detector".into(),
                expected: "images that were gathered for this one".into(),
            });
        }
        if additions.is_empty() {
            return Err(Error::no_images(0, &[]));
        }
        let embeddings = Embeddings::joined(&additions.embeddings)?;
        self.learn_embeddings(&embeddings, additions.images.clone(), Vec::new())
    }
}
