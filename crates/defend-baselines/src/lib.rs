//! The ten-line detectors that the method has to beat, on the same backbone's untouched features
//! (METHOD.md, section 3).
//!
//! [`References::fit`] reads the normal images once; [`References::detector`] gives each [`Reference`] as a
//! [`NoveltyDetector`], and [`References::score_all`] all of them in one pass over the test images.

use std::sync::Arc;

use candle_core::{D, Device, Tensor};
use defend_core::data::{Dataset, Fit, Preprocess};
use defend_core::nn::ops::l2_normalize;
use defend_core::vit::{Backbone, Features, Grid, ImageSource};
use defend_core::{Error, Novelty, NoveltyDetector, Observer, PatchMap, Pictures, preprocess_of};

/// Images a forward pass.
const BATCH: usize = 32;

/// A reference score.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reference {
    /// Mean cosine distance of the CLS token to its five nearest neighbours among the normal images.
    NearestCls,
    /// The same for the mean of the patch tokens.
    NearestMeanPatch,
    /// Cosine distance of the CLS token to the mean of the normal images' unit CLS tokens.
    MeanCls,
    /// The student that always predicts the mean: squared distance of each unit patch token to the mean
    /// of the normal images' unit tokens at its position.
    ConstantStudent,
}

impl Reference {
    /// Every reference.
    pub const ALL: [Self; 4] = [
        Self::NearestCls,
        Self::NearestMeanPatch,
        Self::MeanCls,
        Self::ConstantStudent,
    ];

    /// Name for tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::NearestCls => "5-NN CLS",
            Self::NearestMeanPatch => "5-NN mean patch",
            Self::MeanCls => "cosine to mean CLS",
            Self::ConstantStudent => "constant student",
        }
    }
}

/// Neighbours that are averaged.
const NEIGHBOURS: usize = 5;

/// What all references remember of the normal images.
pub struct References {
    teacher: Arc<dyn Backbone>,
    preprocess: Preprocess,
    device: Device,
    /// Unit CLS tokens, `[images, D]`.
    cls: Tensor,
    /// Unit mean patch tokens, `[images, D]`.
    mean_patch: Tensor,
    /// Mean unit CLS token, `[D]`, of unit length.
    mean_cls: Tensor,
    /// Mean unit patch token of each position, `[N, D]`.
    position_means: Tensor,
}

impl References {
    /// Extracts the features of normal images.
    ///
    /// # Errors
    /// [`Error::NoImages`] when nothing is readable, and what the backbone returns.
    pub fn fit(
        teacher: Arc<dyn Backbone>,
        normal: impl Dataset + 'static,
        fit: Fit,
        device: &Device,
        observer: &mut dyn Observer,
    ) -> Result<Self, Error> {
        let preprocess = preprocess_of(teacher.spec(), fit);
        let memory = usize::MAX;
        let pictures = Pictures::read(
            Arc::new(normal),
            preprocess.clone(),
            device,
            memory,
            false,
            observer,
        )?;
        let indices: Vec<usize> = (0..pictures.len()).collect();
        let (mut cls, mut mean_patch, mut position_sum) = (Vec::new(), Vec::new(), None::<Tensor>);
        for batch in indices.chunks(BATCH) {
            let features = teacher.features(&pictures.images(batch)?)?;
            cls.push(l2_normalize(&features.cls)?);
            mean_patch.push(l2_normalize(&features.patches.mean(1)?)?);
            let sum = l2_normalize(&features.patches)?.sum(0)?;
            position_sum = Some(match position_sum {
                Some(total) => (total + sum)?,
                None => sum,
            });
        }
        let cls = Tensor::cat(&cls, 0)?;
        let position_sum = position_sum.ok_or_else(|| Error::NoImages {
            tried: 0,
            first: "there are none".into(),
        })?;
        Ok(Self {
            mean_cls: l2_normalize(&cls.mean(0)?)?,
            mean_patch: Tensor::cat(&mean_patch, 0)?,
            position_means: (position_sum / pictures.len() as f64)?,
            cls,
            teacher,
            preprocess,
            device: device.clone(),
        })
    }

    /// One reference as a detector.
    pub fn detector(self: &Arc<Self>, reference: Reference) -> ReferenceDetector {
        ReferenceDetector {
            references: Arc::clone(self),
            reference,
        }
    }

    /// Preparation of the pictures.
    pub fn preprocess(&self) -> &Preprocess {
        &self.preprocess
    }

    /// Scores of every reference, in the order of [`Reference::ALL`], for images `[B, 3, H, W]`.
    ///
    /// # Errors
    /// When the images do not fit.
    pub fn score_all(&self, images: &Tensor) -> Result<[Vec<f32>; 4], Error> {
        let features = self.teacher.features(images)?;
        let mut all = [const { Vec::new() }; 4];
        for (scores, reference) in all.iter_mut().zip(Reference::ALL) {
            let novelties = self.novelties(reference, &features)?;
            *scores = novelties.into_iter().map(|n| n.score).collect();
        }
        Ok(all)
    }

    fn novelties(&self, reference: Reference, features: &Features) -> Result<Vec<Novelty>, Error> {
        let unmapped = |scores: Vec<f32>| {
            let novelty = |score| Novelty {
                score,
                verdict: None,
                map: None,
            };
            scores.into_iter().map(novelty).collect()
        };
        Ok(match reference {
            Reference::NearestCls => unmapped(nearest(&self.cls, &features.cls)?),
            Reference::NearestMeanPatch => {
                unmapped(nearest(&self.mean_patch, &features.patches.mean(1)?)?)
            }
            Reference::MeanCls => {
                let unit = l2_normalize(&features.cls)?;
                let cosine = unit.broadcast_mul(&self.mean_cls)?.sum(D::Minus1)?;
                unmapped((1.0 - cosine)?.to_vec1()?)
            }
            Reference::ConstantStudent => {
                let unit = l2_normalize(&features.patches)?;
                let distance = unit
                    .broadcast_sub(&self.position_means)?
                    .sqr()?
                    .sum(D::Minus1)?;
                mapped(distance.to_vec2()?, features.grid)
            }
        })
    }
}

fn mapped(rows: Vec<Vec<f32>>, grid: Grid) -> Vec<Novelty> {
    let novelty = |values: Vec<f32>| Novelty {
        score: values.iter().sum::<f32>() / values.len().max(1) as f32,
        verdict: None,
        map: Some(PatchMap { grid, values }),
    };
    rows.into_iter().map(novelty).collect()
}

/// Mean cosine distance to the nearest of `bank`, `[R, D]` of unit length, for each row of `[B, D]`.
fn nearest(bank: &Tensor, features: &Tensor) -> Result<Vec<f32>, Error> {
    let cosines = l2_normalize(features)?
        .matmul(&bank.t()?)?
        .to_vec2::<f32>()?;
    let mean = |mut row: Vec<f32>| {
        let k = NEIGHBOURS.min(row.len()).max(1);
        row.sort_by(|a, b| b.total_cmp(a));
        row.iter().take(k).map(|cosine| 1.0 - cosine).sum::<f32>() / k as f32
    };
    Ok(cosines.into_iter().map(mean).collect())
}

/// A [`Reference`] behind the role of all detectors.
pub struct ReferenceDetector {
    references: Arc<References>,
    reference: Reference,
}

impl NoveltyDetector for ReferenceDetector {
    fn preprocess(&self) -> &Preprocess {
        &self.references.preprocess
    }

    fn device(&self) -> &Device {
        &self.references.device
    }

    fn score(&self, images: &Tensor) -> Result<Vec<Novelty>, Error> {
        let features = self.references.teacher.features(images)?;
        self.references.novelties(self.reference, &features)
    }
}
