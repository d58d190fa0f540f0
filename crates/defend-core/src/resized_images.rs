//! Resized images in memory, as training loops want them.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Tensor};
use defend_data::{Batches, ContentHash, Dataset, Preprocess, RgbImage, content_hash};
use defend_vit::ImageSource;
use rayon::prelude::*;

use crate::Error;
use crate::normal_images::{THUMBNAIL_SIDE, thumbnail};
use crate::observer::{Event, Observer, Stage, advance};
use crate::scan::Skipped;

/// Images that are read and decoded together.
const READ_BATCH: usize = 64;
/// The same while training: up to three times as many are in memory besides those that are kept.
const AHEAD_BATCH: usize = 32;

/// The readable images of a data set, resized and kept as bytes (150 KB at 224 pixels).
///
/// Images beyond the memory limit are decoded again whenever they are asked for, ahead of the training loop that gives
/// their order with [`ImageSource::prefetch`].
pub struct ResizedImages {
    dataset: Arc<dyn Dataset>,
    preprocess: Preprocess,
    device: Device,
    /// Index in the data set, and the resized image where it is kept.
    kept: Vec<(usize, Option<RgbImage>)>,
    /// Of the resized images.
    hashes: Vec<ContentHash>,
    skipped: Vec<Skipped>,
    ahead: Mutex<Option<Ahead>>,
}

/// Images that do not fit into memory, by their index in the data set, on their way.
struct Ahead {
    batches: Batches,
    coming: HashSet<usize>,
    read: HashMap<usize, RgbImage>,
}

impl Ahead {
    /// An image, if it is among those; waits for it, unless more than `limit` others would wait in memory meanwhile.
    fn take(&mut self, index: usize, limit: usize) -> Option<RgbImage> {
        while self.coming.contains(&index) && self.read.len() <= limit {
            let batch = self.batches.next()?;
            for index in &batch.indices {
                self.coming.remove(index);
            }
            for failure in &batch.failures {
                self.coming.remove(&failure.index);
            }
            self.read
                .extend(batch.indices.into_iter().zip(batch.images));
        }
        self.read.remove(&index)
    }
}

impl ResizedImages {
    /// Reads a data set once, keeping at most `limit` bytes.
    ///
    /// # Errors
    /// [`Error::NoImages`] when nothing is readable; [`Error::Unreadable`] for the first fault when
    /// `strict`.
    pub fn read(
        dataset: Arc<dyn Dataset>,
        preprocess: Preprocess,
        device: &Device,
        limit: usize,
        strict: bool,
        observer: &mut dyn Observer,
    ) -> Result<Self, Error> {
        let total = dataset.len();
        observer.on(&Event::Started {
            stage: Stage::Read,
            images: total as u64,
        });
        let mut kept_bytes = 0;
        let (mut images, mut skipped) = (Vec::with_capacity(total), Vec::new());
        let mut hashes = Vec::with_capacity(total);
        let indices = (0..total).collect();
        for batch in Batches::new(
            Arc::clone(&dataset),
            indices,
            preprocess.clone(),
            READ_BATCH,
        )? {
            let handled = batch.indices.len() + batch.failures.len();
            hashes.par_extend(batch.images.par_iter().map(content_hash));
            for (index, image) in batch.indices.into_iter().zip(batch.images) {
                kept_bytes += image.as_raw().len();
                images.push((index, (kept_bytes <= limit).then_some(image)));
            }
            for failure in batch.failures {
                observer.on(&Event::Skipped(&failure));
                if strict {
                    return Err(Error::Unreadable {
                        name: failure.name,
                        source: failure.error,
                    });
                }
                skipped.push(Skipped::from(failure));
            }
            advance(observer, handled)?;
        }
        observer.on(&Event::Finished { stage: Stage::Read });
        if images.is_empty() {
            return Err(Error::no_images(total, &skipped));
        }
        Ok(Self {
            dataset,
            preprocess,
            device: device.clone(),
            kept: images,
            hashes,
            skipped,
            ahead: Mutex::new(None),
        })
    }

    /// Images that could not be read.
    pub fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    /// Hash of an image as it is after the resize.
    pub fn hash(&self, image: usize) -> Option<ContentHash> {
        self.hashes.get(image).copied()
    }

    /// A small copy of an image in its own shape, as a JPEG; none for one that can no longer be read.
    pub(crate) fn thumbnail(&self, image: usize) -> Option<Vec<u8>> {
        let least = [2 * THUMBNAIL_SIDE; 2];
        let image = self.dataset.image_at_least(self.index(image)?, least);
        thumbnail(&image.ok()?)
    }

    /// Place of an image in its data set.
    pub fn index(&self, image: usize) -> Option<usize> {
        self.kept.get(image).map(|(index, _)| *index)
    }

    /// Name of an image, `""` for one that there is not.
    pub fn name(&self, index: usize) -> String {
        let found = self.kept.get(index);
        found.map_or_else(String::new, |(index, _)| {
            self.dataset.name(*index).into_owned()
        })
    }

    /// Reads an image that did not fit into memory.
    fn again(&self, index: usize) -> Result<RgbImage, defend_data::Error> {
        self.preprocess.read(&*self.dataset, index)
    }

    /// Index in the data set of an image that is not in memory.
    fn not_kept(&self, i: usize) -> Option<usize> {
        match self.kept.get(i) {
            Some((index, None)) => Some(*index),
            _ => None,
        }
    }

    /// Those of the images that were prefetched.
    fn read_ahead(&self, indices: &[usize]) -> HashMap<usize, RgbImage> {
        // A poisoned lock means that a data set panicked, which reaches the caller anyway.
        let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(coming) = &mut *ahead else {
            return HashMap::new();
        };
        let limit = indices.len() + 2 * AHEAD_BATCH;
        let missing = indices.iter().filter_map(|&i| self.not_kept(i));
        let read = missing.filter_map(|index| Some((index, coming.take(index, limit)?)));
        let read = read.collect();
        if coming.read.len() > limit {
            // Nobody asks in the announced order.
            *ahead = None;
        }
        read
    }
}

impl ImageSource for ResizedImages {
    fn len(&self) -> usize {
        self.kept.len()
    }

    fn images(&self, indices: &[usize]) -> Result<Tensor, defend_vit::Error> {
        let (width, height) = self.preprocess.input_size();
        let length = self.preprocess.input_len();
        let mut values = vec![0f32; indices.len() * length];
        let ahead = self.read_ahead(indices);
        values
            .par_chunks_mut(length)
            .zip(indices)
            .try_for_each(|(target, &i)| match self.kept.get(i) {
                Some((_, Some(image))) => self.preprocess.normalize_into(image, target),
                Some((index, None)) => match ahead.get(index) {
                    Some(image) => self.preprocess.normalize_into(image, target),
                    // Asked for out of turn, or with a fault that this names.
                    None => self.preprocess.normalize_into(&self.again(*index)?, target),
                },
                None => Err(defend_data::Error::Index {
                    index: i,
                    len: self.kept.len(),
                }),
            })
            .map_err(|source| defend_vit::Error::ImageSource {
                index: indices.first().copied().unwrap_or(0),
                source: Box::new(source),
            })?;
        Ok(Tensor::from_vec(
            values,
            (indices.len(), 3, height as usize, width as usize),
            &self.device,
        )?)
    }

    fn prefetch(&self, order: &[usize]) {
        let missing: Vec<usize> = order.iter().filter_map(|&i| self.not_kept(i)).collect();
        let ahead = (!missing.is_empty()).then(|| {
            let coming = missing.iter().copied().collect();
            let dataset = Arc::clone(&self.dataset);
            let preprocess = self.preprocess.clone();
            Batches::new(dataset, missing, preprocess, AHEAD_BATCH).map(|batches| Ahead {
                batches,
                coming,
                read: HashMap::new(),
            })
        });
        // Without a thread to prefetch with, images are read when they are asked for.
        let ahead = ahead.and_then(Result::ok);
        *self.ahead.lock().unwrap_or_else(PoisonError::into_inner) = ahead;
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::thread;
    use std::time::{Duration, Instant};

    use defend_data::ClassId;

    use super::*;
    use crate::Silent;

    const COLOURS: usize = 150;

    /// Images of one colour.
    #[derive(Default)]
    struct Colours {
        /// How often one was read.
        reads: AtomicUsize,
        /// Whether number seven can no longer be read.
        gone: AtomicBool,
    }

    impl Dataset for Colours {
        fn len(&self) -> usize {
            COLOURS
        }

        fn name(&self, index: usize) -> Cow<'_, str> {
            index.to_string().into()
        }

        fn classes(&self, _: usize) -> &[ClassId] {
            &[]
        }

        fn class_names(&self) -> &[String] {
            &[]
        }

        fn image(&self, index: usize) -> Result<RgbImage, defend_data::Error> {
            self.reads.fetch_add(1, Ordering::SeqCst);
            if index == 7 && self.gone.load(Ordering::SeqCst) {
                let source = std::io::Error::other("number seven is gone");
                let path = "seven".into();
                return Err(defend_data::Error::Read { path, source });
            }
            Ok(RgbImage::from_pixel(
                16,
                16,
                image::Rgb([index as u8, 0, 0]),
            ))
        }
    }

    /// All colours, of which `limit` bytes are kept.
    fn images(colours: &Arc<Colours>, limit: usize) -> ResizedImages {
        let dataset: Arc<dyn Dataset> = colours.clone();
        let preprocess = Preprocess::new(16, [0.0; 3], [1.0; 3]);
        ResizedImages::read(dataset, preprocess, &Device::Cpu, limit, true, &mut Silent).unwrap()
    }

    #[test]
    fn images_beyond_the_memory_are_read_ahead_once_an_epoch_and_are_the_same() {
        let colours = Arc::<Colours>::default();
        let reads = || colours.reads.load(Ordering::SeqCst);
        let kept = images(&colours, 1 << 20);
        let some = images(&colours, 10 * 3 * 16 * 16);
        let order: Vec<usize> = (0..COLOURS).rev().collect();
        let values = |images: &ResizedImages, indices: &[usize]| {
            let images = images.images(indices).unwrap();
            images.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        for _ in 0..2 {
            let before = reads();
            some.prefetch(&order);
            let start = Instant::now();
            while reads() == before {
                assert!(start.elapsed() < Duration::from_mins(1), "not prefetched");
                thread::sleep(Duration::from_millis(1));
            }
            for indices in order.chunks(9) {
                assert_eq!(values(&some, indices), values(&kept, indices));
            }
            assert_eq!(reads() - before, COLOURS - 10);
        }
        // Out of turn, and never announced.
        some.prefetch(&order[..50]);
        for indices in [[120, 60], [149, 15], [101, 40]] {
            assert_eq!(values(&some, &indices), values(&kept, &indices));
        }
        // Another order replaces it.
        some.prefetch(&[]);
        assert!(some.ahead.lock().unwrap().is_none());
        assert_eq!(values(&some, &[30]), values(&kept, &[30]));
    }

    #[test]
    fn little_waits_in_memory_whatever_is_asked_for() {
        let images = images(&Arc::default(), 0);
        let order: Vec<usize> = (0..COLOURS).collect();
        images.prefetch(&order);
        // The last of all: all others would have to wait.
        images.images(&[COLOURS - 1]).unwrap();
        assert!(images.ahead.lock().unwrap().is_none());
        images.images(&order[..2]).unwrap();
    }

    #[test]
    fn an_image_that_can_no_longer_be_read_is_named() {
        let colours = Arc::<Colours>::default();
        let images = images(&colours, 0);
        let order: Vec<usize> = (0..COLOURS).collect();
        colours.gone.store(true, Ordering::SeqCst);
        images.prefetch(&order);
        assert!(images.images(&order[..5]).is_ok());
        let error = images.images(&order[5..10]).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("seven"), "{source}");
        assert!(images.images(&order[10..20]).is_ok());
    }
}
