//! The detector: teacher, student, score and threshold.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use defend_data::{Dataset, Preprocess};
use defend_distill::{DistillObjective, Score, discrepancy};
use defend_metrics::{FalseAlarmRate, Threshold, threshold_for};
use defend_vit::{Backbone, Grid};
use ndarray::ArrayView1;
use serde::{Deserialize, Serialize};

use crate::{DefendConfig, Error, Observer, Scan, scan};

/// Role: anything that scores images, larger for more novel.
pub trait NoveltyDetector: Send + Sync {
    /// How pictures are prepared for [`NoveltyDetector::score`].
    fn preprocess(&self) -> &Preprocess;

    /// Where the images have to be.
    fn device(&self) -> &Device;

    /// Images a forward pass.
    fn batch(&self) -> usize {
        32
    }

    /// One result an image; `images`: `[B, 3, H, W]`, prepared as [`NoveltyDetector::preprocess`] says.
    ///
    /// # Errors
    /// When the images do not fit.
    fn score(&self, images: &Tensor) -> Result<Vec<Novelty>, Error>;
}

/// Answer to "is this image novel?".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The score is at or below the threshold.
    Normal,
    /// The score is above it.
    Novel,
}

/// What a detector says of an image.
#[derive(Debug, Clone, PartialEq)]
pub struct Novelty {
    /// Novelty score, larger for more novel.
    pub score: f32,
    /// The decision, once the detector is calibrated.
    pub verdict: Option<Verdict>,
    /// Where the novelty is, for detectors that know.
    pub map: Option<PatchMap>,
}

/// A novelty value for each patch.
#[derive(Debug, Clone, PartialEq)]
pub struct PatchMap {
    /// Patches of the view.
    pub grid: Grid,
    /// Values, row-major over the grid.
    pub values: Vec<f32>,
}

/// The two neighbours of a target position and the share of the second.
fn neighbours(target: usize, from: usize, to: usize) -> (usize, usize, f32) {
    let at = (target as f32 + 0.5) * from as f32 / to as f32 - 0.5;
    let at = at.clamp(0.0, (from - 1) as f32);
    let first = at as usize;
    (first, (first + 1).min(from - 1), at - first as f32)
}

impl PatchMap {
    /// The values at another size, row-major, bilinear as PyTorch's `interpolate(align_corners=False)`, of any magnitude;
    /// `None` when their number does not fit the grid.
    pub fn resized(&self, width: usize, height: usize) -> Option<Vec<f32>> {
        let Grid { rows, columns } = self.grid;
        if rows == 0 || columns == 0 || self.values.len() != rows * columns {
            return None;
        }
        let across: Vec<_> = (0..width).map(|x| neighbours(x, columns, width)).collect();
        let mut values = Vec::with_capacity(width * height);
        for y in 0..height {
            let (top, bottom, down) = neighbours(y, rows, height);
            let (top, bottom) = (top * columns, bottom * columns);
            let between = |a: f32, b: f32, share: f32| a + (b - a) * share;
            values.extend(across.iter().map(|&(left, right, share)| {
                let upper = between(self.values[top + left], self.values[top + right], share);
                let lower = between(
                    self.values[bottom + left],
                    self.values[bottom + right],
                    share,
                );
                between(upper, lower, down)
            }));
        }
        Some(values)
    }
}

/// The threshold of a detector and where it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// Images with a larger score are novel.
    pub threshold: f64,
    /// The share of normal images that may be called novel.
    pub false_alarm_rate: f64,
    /// Held-out normal images that the threshold was taken from.
    pub images: usize,
}

/// How patch values become colours, from the training images.
///
/// Some patches are always hard to predict, such as a Vision Transformer's corners: what counts is how far a
/// value lies above what is usual at its position.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MapScale {
    /// Median value of each patch over training images, row-major: no colour up to it.
    pub usual: Vec<f32>,
    /// Distance above it that gets the full colour: twice the 99th percentile of the training images.
    pub span: f32,
}

impl MapScale {
    /// The median of each patch over `maps` of one grid, and `headroom` times the 99th percentile of what lies above it.
    pub fn of(maps: &[&PatchMap], headroom: f32) -> Self {
        let patches = maps.first().map_or(0, |map| map.values.len());
        let usual: Vec<f32> = (0..patches)
            .map(|i| {
                let values = maps.iter().filter_map(|map| map.values.get(i).copied());
                quantile(values.collect(), 0.5)
            })
            .collect();
        let above = maps.iter().flat_map(|map| {
            let pairs = map.values.iter().zip(&usual);
            pairs.map(|(value, usual)| value - usual)
        });
        let span = headroom * quantile(above.collect(), 0.99);
        Self { usual, span }
    }
}

/// The value at a share of the order, 0 without any.
fn quantile(mut values: Vec<f32>, share: f64) -> f32 {
    values.sort_by(f32::total_cmp);
    let at = (share * values.len().saturating_sub(1) as f64).round() as usize;
    values.get(at).copied().unwrap_or(0.0)
}

/// The method's detector (section 3.3): an image is as novel as the student's prediction of the
/// teacher's features is wrong.
pub struct Detector {
    pub(crate) teacher: Arc<dyn Backbone>,
    pub(crate) student: Arc<dyn Backbone>,
    pub(crate) objective: Arc<dyn DistillObjective>,
    pub(crate) score: Arc<dyn Score>,
    /// A custom objective or score, which a model file cannot hold.
    pub(crate) custom: Option<&'static str>,
    pub(crate) config: DefendConfig,
    pub(crate) preprocess: Preprocess,
    pub(crate) device: Device,
    pub(crate) calibration: Option<Calibration>,
    pub(crate) map_scale: MapScale,
}

impl Detector {
    /// Chooses the threshold from held-out normal images such that at most the given share of normal
    /// images is called novel, on average over such samples.
    ///
    /// An earlier calibration stays when this one fails.
    ///
    /// # Errors
    /// [`Error::NoImages`] when nothing is readable; [`Error::Metrics`] when there are too few images for
    /// the rate, naming the number that is needed.
    pub fn calibrate(
        &mut self,
        held_out: impl Dataset + 'static,
        rate: FalseAlarmRate,
        observer: &mut dyn Observer,
    ) -> Result<Scan, Error> {
        let tried = held_out.len();
        let scan = scan(self, held_out, observer)?;
        let scores = scan.scores();
        if scores.is_empty() {
            return Err(Error::NoImages {
                tried,
                first: scan
                    .skipped
                    .first()
                    .map_or_else(|| "there are none".into(), ToString::to_string),
            });
        }
        let threshold = threshold_for(ArrayView1::from(&scores), rate)?;
        self.calibration = Some(Calibration {
            threshold: threshold.get(),
            false_alarm_rate: rate.get(),
            images: scores.len(),
        });
        Ok(scan)
    }

    /// The threshold, once calibrated.
    pub fn calibration(&self) -> Option<&Calibration> {
        self.calibration.as_ref()
    }

    /// Settings of the fit.
    pub fn config(&self) -> &DefendConfig {
        &self.config
    }

    /// How patch values become the colours of a heat map.
    pub fn map_scale(&self) -> &MapScale {
        &self.map_scale
    }

    /// The backbone whose features are predicted.
    pub fn teacher(&self) -> &dyn Backbone {
        &*self.teacher
    }

    /// The backbone that predicts them.
    pub fn student(&self) -> &dyn Backbone {
        &*self.student
    }

    /// Replaces the step from patch distances to a score; calibrate again afterwards.
    #[must_use]
    pub fn with_score(mut self, score: Arc<dyn Score>) -> Self {
        self.score = score;
        self.custom = Some("score");
        self.calibration = None;
        self
    }

    /// Replaces the score by one of the library's; calibrate again afterwards.
    ///
    /// # Errors
    /// [`Error::Config`] for a score of the CLS token of a student that has not learnt it.
    pub fn with_aggregation(
        mut self,
        aggregation: defend_distill::Aggregation,
    ) -> Result<Self, Error> {
        let config = DefendConfig {
            aggregation,
            ..self.config.clone()
        };
        config.validate()?;
        self.config = config;
        self.score = Arc::new(aggregation);
        self.calibration = None;
        Ok(self)
    }
}

impl NoveltyDetector for Detector {
    fn preprocess(&self) -> &Preprocess {
        &self.preprocess
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn batch(&self) -> usize {
        self.config.batch
    }

    fn score(&self, images: &Tensor) -> Result<Vec<Novelty>, Error> {
        let size = self.preprocess.size;
        // The backbones take any size, but their distances at another one say nothing.
        if !matches!(images.dims(), &[_, 3, h, w] if h == size as usize && w == size as usize) {
            return Err(Error::Images {
                found: images.dims().to_vec(),
                size,
            });
        }
        let found = discrepancy(
            &*self.teacher,
            &*self.student,
            &*self.objective,
            self.config.distill.layers,
            images,
        )?;
        let scores = self.score.score(&found)?;
        let threshold = match self.calibration {
            Some(calibration) => Some(Threshold::new(calibration.threshold)?),
            None => None,
        };
        let maps = found.patches.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let results = scores.into_iter().zip(maps).map(|(score, values)| Novelty {
            score,
            verdict: threshold.map(|t| {
                if t.is_novel(f64::from(score)) {
                    Verdict::Novel
                } else {
                    Verdict::Normal
                }
            }),
            map: Some(PatchMap {
                grid: found.grid,
                values,
            }),
        });
        Ok(results.collect())
    }
}
