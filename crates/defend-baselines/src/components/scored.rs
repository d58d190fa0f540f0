//! A detector that is a backbone and a step from its features to scores.

use std::sync::Arc;

use candle_core::{D, Device, Tensor};
use defend_core::data::Preprocess;
use defend_core::vit::{Backbone, Features, Grid};
use defend_core::{Error, Novelty, NoveltyDetector, PatchMap};

use crate::Teacher;

/// Role: from features to results.
pub(crate) trait Density: Send + Sync {
    fn novelties(&self, features: &Features) -> Result<Vec<Novelty>, Error>;
}

/// A backbone whose features a density scores.
pub(crate) struct Scored<S> {
    pub(crate) backbone: Arc<dyn Backbone>,
    pub(crate) density: S,
    pub(crate) preprocess: Preprocess,
    pub(crate) device: Device,
}

impl<S: Density + 'static> Scored<S> {
    pub(crate) fn boxed(
        teacher: &Teacher,
        backbone: Arc<dyn Backbone>,
        density: S,
    ) -> Box<dyn NoveltyDetector> {
        Box::new(Self {
            backbone,
            density,
            preprocess: teacher.preprocess().clone(),
            device: teacher.device().clone(),
        })
    }
}

impl<S: Density> NoveltyDetector for Scored<S> {
    fn preprocess(&self) -> &Preprocess {
        &self.preprocess
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn score(&self, images: &Tensor) -> Result<Vec<Novelty>, Error> {
        self.density.novelties(&self.backbone.features(images)?)
    }
}

/// Results without a map.
pub(crate) fn unmapped(scores: Vec<f32>) -> Vec<Novelty> {
    let novelty = |score| Novelty::of_score(f64::from(score));
    scores.into_iter().map(novelty).collect()
}

/// How the values of an image's patches become its score.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Pool {
    Mean,
    Largest,
}

/// Results from the patches' values, `[B, N]`.
pub(crate) fn mapped(values: &Tensor, grid: Grid, pool: Pool) -> Result<Vec<Novelty>, Error> {
    let scores = match pool {
        Pool::Mean => values.mean(D::Minus1)?,
        Pool::Largest => values.max(D::Minus1)?,
    };
    let pairs = scores.to_vec1::<f32>()?.into_iter().zip(values.to_vec2()?);
    let novelty = |(score, values): (f32, _)| Novelty {
        map: Some(PatchMap { grid, values }),
        ..Novelty::of_score(f64::from(score))
    };
    Ok(pairs.map(novelty).collect())
}
