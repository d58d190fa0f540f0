//! Resized pictures in memory, as training loops want them.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use defend_data::{Batches, Dataset, Preprocess, RgbImage};
use defend_vit::ImageSource;
use rayon::prelude::*;

use crate::Error;
use crate::observer::{Event, Observer, Stage};
use crate::scan::Skipped;

/// Images that are read and decoded together.
const READ_BATCH: usize = 64;

/// The readable pictures of a data set, resized and kept as bytes (150 KB at 224 pixels).
///
/// Pictures beyond the memory limit are decoded again whenever they are asked for.
pub struct Pictures {
    dataset: Arc<dyn Dataset>,
    preprocess: Preprocess,
    device: Device,
    /// Index in the data set, and the resized picture where it is kept.
    kept: Vec<(usize, Option<RgbImage>)>,
    skipped: Vec<Skipped>,
}

impl Pictures {
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
        let (mut pictures, mut skipped) = (Vec::with_capacity(total), Vec::new());
        let indices = (0..total).collect();
        for batch in Batches::new(
            Arc::clone(&dataset),
            indices,
            preprocess.clone(),
            READ_BATCH,
        )? {
            let handled = batch.indices.len() + batch.failures.len();
            for (index, picture) in batch.indices.into_iter().zip(batch.pictures) {
                kept_bytes += picture.as_raw().len();
                pictures.push((index, (kept_bytes <= limit).then_some(picture)));
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
            observer.on(&Event::Advanced {
                images: handled as u64,
                loss: None,
            });
        }
        observer.on(&Event::Finished { stage: Stage::Read });
        if pictures.is_empty() {
            return Err(Error::NoImages {
                tried: total,
                first: skipped
                    .first()
                    .map_or_else(|| "there are none".into(), Skipped::to_string),
            });
        }
        Ok(Self {
            dataset,
            preprocess,
            device: device.clone(),
            kept: pictures,
            skipped,
        })
    }

    /// Pictures that could not be read.
    pub fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    /// Reads a picture that did not fit into memory.
    fn again(&self, index: usize) -> Result<RgbImage, defend_data::Error> {
        self.preprocess.resize(&self.dataset.image(index)?)
    }
}

impl ImageSource for Pictures {
    fn len(&self) -> usize {
        self.kept.len()
    }

    fn images(&self, indices: &[usize]) -> Result<Tensor, defend_vit::Error> {
        let size = self.preprocess.size as usize;
        let mut values = vec![0f32; indices.len() * 3 * size * size];
        values
            .par_chunks_mut(3 * size * size)
            .zip(indices)
            .try_for_each(|(target, &i)| match self.kept.get(i) {
                Some((_, Some(picture))) => self.preprocess.normalize_into(picture, target),
                Some((index, None)) => self.preprocess.normalize_into(&self.again(*index)?, target),
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
            (indices.len(), 3, size, size),
            &self.device,
        )?)
    }
}
