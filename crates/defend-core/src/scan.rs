//! Scoring many images.

use std::fmt;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use defend_data::{Batches, Dataset, Failure, Preprocess, RgbImage};

use crate::input::to_tensor;
use crate::observer::{Event, Observer, Stage, advance};
use crate::{Error, Novelty, NoveltyDetector};

/// What was found in an image.
#[derive(Debug, Clone)]
pub struct Finding {
    /// Position in the data set.
    pub index: usize,
    /// Name in the data set.
    pub name: String,
    /// Score, verdict and map.
    pub novelty: Novelty,
}

/// An image that was left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// Position in the data set.
    pub index: usize,
    /// Name in the data set.
    pub name: String,
    /// What is wrong with it.
    pub reason: String,
}

impl From<Failure> for Skipped {
    fn from(failure: Failure) -> Self {
        Self {
            index: failure.index,
            name: failure.name,
            reason: failure.error.to_string(),
        }
    }
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.reason)
    }
}

/// Everything that was found in a data set.
#[derive(Debug, Clone, Default)]
pub struct Scan {
    /// One finding a readable image, in the data set's order.
    pub findings: Vec<Finding>,
    /// Images that could not be read.
    pub skipped: Vec<Skipped>,
}

impl Scan {
    /// The scores, in the order of the findings.
    pub fn scores(&self) -> Vec<f64> {
        let findings = self.findings.iter();
        findings.map(|f| f.novelty.score).collect()
    }
}

/// Whether patch maps are wanted beside the scores; a closed form whose score needs no patches computes them only then.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Maps {
    /// Only where they cost nothing.
    #[default]
    Free,
    /// Wherever the detector has them.
    Wanted,
}

/// Scores every image of a data set; unreadable ones are listed, not fatal. Findings have maps only where these cost nothing:
/// see [`scan_with_maps`].
///
/// # Errors
/// [`Error::NonFiniteScore`], and what the detector returns.
pub fn scan(
    detector: &dyn NoveltyDetector,
    images: impl Dataset + 'static,
    observer: &mut dyn Observer,
) -> Result<Scan, Error> {
    let images: Arc<dyn Dataset> = Arc::new(images);
    scan_all(detector, &images, Maps::Free, observer)
}

/// As [`scan()`], with a map in each finding where the detector has maps.
///
/// # Errors
/// As [`scan()`].
pub fn scan_with_maps(
    detector: &dyn NoveltyDetector,
    images: impl Dataset + 'static,
    observer: &mut dyn Observer,
) -> Result<Scan, Error> {
    let images: Arc<dyn Dataset> = Arc::new(images);
    scan_all(detector, &images, Maps::Wanted, observer)
}

pub(crate) fn scan_all(
    detector: &dyn NoveltyDetector,
    images: &Arc<dyn Dataset>,
    maps: Maps,
    observer: &mut dyn Observer,
) -> Result<Scan, Error> {
    let mut scan = Scan::default();
    scan_each::<Error>(detector, images, maps, observer, &mut |outcome| {
        match outcome {
            Ok((finding, _)) => scan.findings.push(finding),
            Err(failure) => scan.skipped.push(Skipped::from(failure)),
        }
        Ok(())
    })?;
    Ok(scan)
}

/// What a detector scores by other means, for runs that keep more of an image than its score.
pub(crate) struct ScoredBy<'a, F> {
    pub(crate) detector: &'a dyn NoveltyDetector,
    pub(crate) score: F,
}

impl<F: Fn(&Tensor) -> Result<Vec<Novelty>, Error> + Send + Sync> NoveltyDetector
    for ScoredBy<'_, F>
{
    fn preprocess(&self) -> &Preprocess {
        self.detector.preprocess()
    }

    fn device(&self) -> &Device {
        self.detector.device()
    }

    fn batch_size(&self) -> usize {
        self.detector.batch_size()
    }

    fn score(&self, images: &Tensor) -> Result<Vec<Novelty>, Error> {
        (self.score)(images)
    }
}

/// A finding with its resized image, or why there is none.
pub type Outcome = Result<(Finding, RgbImage), Failure>;

/// What takes the results one by one.
type OnResult<'a, E> = dyn FnMut(Outcome) -> Result<(), E> + 'a;

/// As [`scan()`], handing over each result as soon as it is there, for any number of images in constant
/// memory, in the data set's order; an error of `on_result` ends the run.
///
/// # Errors
/// As [`scan()`], and those of `on_result`.
pub fn scan_each<E: From<Error>>(
    detector: &dyn NoveltyDetector,
    images: &Arc<dyn Dataset>,
    maps: Maps,
    observer: &mut dyn Observer,
    on_result: &mut OnResult<'_, E>,
) -> Result<(), E> {
    let total = images.len();
    observer.on(&Event::Started {
        stage: Stage::Score,
        images: total as u64,
    });
    let preprocess = detector.preprocess();
    let batches = Batches::new(
        Arc::clone(images),
        (0..total).collect(),
        preprocess.clone(),
        detector.batch_size(),
    )
    .map_err(Error::from)?;
    for batch in batches {
        let handled = batch.indices.len() + batch.failures.len();
        let mut failures = batch.failures.into_iter().peekable();
        // A failure stands where its image stands.
        let mut hand_over =
            |before: usize, observer: &mut dyn Observer, on_result: &mut OnResult<'_, E>| {
                while let Some(failure) = failures.next_if(|failure| failure.index < before) {
                    observer.on(&Event::Skipped(&failure));
                    on_result(Err(failure))?;
                }
                Ok::<(), E>(())
            };
        if !batch.images.is_empty() {
            let tensor = to_tensor(&batch.images, preprocess, detector.device())?;
            let novelties = match maps {
                Maps::Free => detector.score(&tensor),
                Maps::Wanted => detector.score_with_maps(&tensor),
            };
            let name = |image: usize| {
                let index = batch.indices.get(image);
                index.map_or_else(String::new, |&i| images.name(i).into_owned())
            };
            let novelties = novelties.map_err(|error| error.naming(name))?;
            let results = batch.indices.into_iter().zip(batch.images).zip(novelties);
            for ((index, image), novelty) in results {
                let name = images.name(index).into_owned();
                if !novelty.score.is_finite() {
                    let score = novelty.score;
                    return Err(E::from(Error::NonFiniteScore { name, score }));
                }
                let finding = Finding {
                    index,
                    name,
                    novelty,
                };
                hand_over(index, observer, on_result)?;
                on_result(Ok((finding, image)))?;
            }
        }
        hand_over(total, observer, on_result)?;
        advance(observer, handled)?;
    }
    observer.on(&Event::Finished {
        stage: Stage::Score,
    });
    Ok(())
}
