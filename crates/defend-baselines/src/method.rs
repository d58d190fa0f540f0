//! What every method of the benchmark is: something that learns from normal images.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use defend_core::data::{Dataset, Preprocess, ResizeMode};
use defend_core::vit::{
    Backbone, CacheConfig, Cached, Encoder, Features, ImageSource, TrainScope, Vit,
};
use defend_core::{
    BackgroundSource, Error, NoveltyDetector, Observer, ResizedImages, preprocess_of,
};

/// Images a forward pass.
pub(crate) const BATCH: usize = 32;

/// Role: a way to make a detector from normal images.
pub trait Method: Send + Sync {
    /// Learns what is normal; the same seed gives the same detector.
    ///
    /// # Errors
    /// [`Error::NoImages`], [`Error::Unreadable`] for an image that cannot be read, and what the method's stages return.
    fn fit(
        &self,
        teacher: &Teacher,
        normal: Arc<dyn Dataset>,
        seed: u64,
        observer: &mut dyn Observer,
    ) -> Result<Box<dyn NoveltyDetector>, Error>;

    /// Last layers of a backbone of `depth` blocks that the method looks at.
    fn layers(&self, _depth: usize) -> usize {
        1
    }

    /// Name for tables.
    fn name(&self) -> String;

    /// What differs from the method's paper; empty for a paper's own method.
    fn deviations(&self) -> &'static str;
}

/// The pretrained backbone that methods start from, and how images are prepared for it.
///
/// Its untouched features are computed once an image, whichever methods ask for them.
#[derive(Clone)]
pub struct Teacher {
    vit: Arc<Vit>,
    cached: Arc<Cached>,
    preprocess: Preprocess,
    device: Device,
    background: BackgroundSource,
}

impl Teacher {
    /// A frozen backbone whose last `layers` layers are cached as `cache` says: as many as the methods' largest
    /// [`Method::layers`].
    ///
    /// # Errors
    /// What [`Cached::new`] and [`Vit::with_layers`] return.
    pub fn new(
        vit: Vit,
        layers: usize,
        resize_mode: ResizeMode,
        device: &Device,
        cache: CacheConfig,
    ) -> Result<Self, Error> {
        let vit = Arc::new(vit.with_layers(1)?);
        let whole = vit.copy(TrainScope::Frozen)?.with_layers(layers)?;
        Ok(Self {
            preprocess: preprocess_of(vit.spec(), resize_mode),
            cached: Arc::new(Cached::new(Arc::new(whole), cache)?),
            vit,
            device: device.clone(),
            background: BackgroundSource::None,
        })
    }

    /// Gives this library's closed form ordinary photos to contrast with.
    #[must_use]
    pub fn with_background(mut self, background: impl Into<BackgroundSource>) -> Self {
        self.background = background.into();
        self
    }

    /// What this library's closed form contrasts with.
    pub fn background(&self) -> &BackgroundSource {
        &self.background
    }

    /// The backbone, to be copied by methods that train it.
    pub fn vit(&self) -> &Arc<Vit> {
        &self.vit
    }

    /// Number of blocks.
    pub fn depth(&self) -> usize {
        self.vit.spec().architecture.depth
    }

    /// The untouched features of the last `layers` layers, computed once an image.
    ///
    /// # Errors
    /// [`defend_core::vit::Error::Config`] for more layers than the teacher caches.
    pub fn backbone(&self, layers: usize) -> Result<Arc<dyn Backbone>, Error> {
        Ok(Arc::new(self.cached.with_layers(layers)?))
    }

    /// Preparation of the images.
    pub fn preprocess(&self) -> &Preprocess {
        &self.preprocess
    }

    /// Where to compute.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Reads normal images for a fit.
    ///
    /// # Errors
    /// As [`ResizedImages::read`] when strict: a benchmark's images are all readable.
    pub fn read(
        &self,
        images: Arc<dyn Dataset>,
        observer: &mut dyn Observer,
    ) -> Result<ResizedImages, Error> {
        self.read_as(images, &self.preprocess, observer)
    }

    /// As [`Teacher::read`], prepared in another way.
    pub(crate) fn read_as(
        &self,
        images: Arc<dyn Dataset>,
        preprocess: &Preprocess,
        observer: &mut dyn Observer,
    ) -> Result<ResizedImages, Error> {
        let preprocess = preprocess.clone();
        ResizedImages::read(
            images,
            preprocess,
            &self.device,
            IMAGE_BYTES,
            true,
            observer,
        )
    }
}

/// Limit of the memory for resized images: 14,000 at 224 pixels.
const IMAGE_BYTES: usize = 2 << 30;

/// Hands over the features of all images, batch by batch.
pub(crate) fn each_batch(
    backbone: &dyn Backbone,
    images: &dyn ImageSource,
    mut on_batch: impl FnMut(Features) -> Result<(), Error>,
) -> Result<(), Error> {
    let indices: Vec<usize> = (0..images.len()).collect();
    for batch in indices.chunks(BATCH) {
        on_batch(backbone.features(&images.images(batch)?)?)?;
    }
    Ok(())
}

/// The CLS tokens of all images, `[images, D]`.
pub(crate) fn cls_of(backbone: &dyn Backbone, images: &dyn ImageSource) -> Result<Tensor, Error> {
    let mut all = Vec::new();
    each_batch(backbone, images, |features| {
        all.push(features.cls);
        Ok(())
    })?;
    Ok(Tensor::cat(&all, 0)?)
}
