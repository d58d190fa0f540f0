//! PaDiM (Defard et al., 2021): a normal distribution for every position of the patch grid.

use std::sync::Arc;

use candle_core::Tensor;
use defend_core::data::Dataset;
use defend_core::nn::Rng;
use defend_core::vit::Features;
use defend_core::{Error, Novelty, NoveltyDetector, Observer};
use rand::seq::index::sample;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::components::gaussian::{Gaussian, Moments};
use crate::components::middle::{layers_needed, middle_patches};
use crate::components::scored::{Density, Pool, Scored, mapped};
use crate::method::each_batch;
use crate::{Method, Teacher};

/// Mahalanobis distance of each patch to the normal images' patches at its position; the largest is the score.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Padim {
    /// Random channels that are kept of the joined layers. Paper: 100 for a ResNet-18.
    pub channels: usize,
    /// Added to the diagonal of each covariance. Paper: 0.01.
    pub regularization: f64,
}

impl Default for Padim {
    fn default() -> Self {
        Self {
            channels: 100,
            regularization: 0.01,
        }
    }
}

struct Positions {
    /// One for each position of the grid.
    gaussians: Vec<Gaussian>,
    channels: Tensor,
    depth: usize,
}

impl Density for Positions {
    fn novelties(&self, features: &Features) -> Result<Vec<Novelty>, Error> {
        let patches = middle_patches(features, self.depth)?;
        let patches = patches.index_select(&self.channels, 2)?;
        let (b, n, _) = patches.dims3()?;
        let rows = patches.to_vec3::<f32>()?;
        let values: Vec<f32> = rows
            .par_iter()
            .flat_map_iter(|image| {
                let pairs = image.iter().zip(&self.gaussians);
                pairs.map(|(row, gaussian)| gaussian.distance(row).sqrt())
            })
            .collect();
        mapped(
            &Tensor::from_vec(values, (b, n), &candle_core::Device::Cpu)?,
            features.grid,
            Pool::Largest,
        )
    }
}

impl Method for Padim {
    fn fit(
        &self,
        teacher: &Teacher,
        normal: Arc<dyn Dataset>,
        seed: u64,
        observer: &mut dyn Observer,
    ) -> Result<Box<dyn NoveltyDetector>, Error> {
        let depth = teacher.depth();
        let backbone = teacher.backbone(layers_needed(depth))?;
        let images = teacher.read(normal, observer)?;
        let mut positions: Vec<Moments> = Vec::new();
        let mut channels = None;
        each_batch(&*backbone, &images, |features| {
            let patches = middle_patches(&features, depth)?;
            let chosen = match &channels {
                Some(chosen) => Tensor::clone(chosen),
                None => self.choose(&patches, seed)?,
            };
            for image in patches.index_select(&chosen, 2)?.to_vec3::<f32>()? {
                if positions.is_empty() {
                    positions = image.iter().map(|row| Moments::new(row)).collect();
                } else {
                    let pairs = positions.par_iter_mut().zip(&image);
                    pairs.for_each(|(moments, row)| moments.add(row));
                }
            }
            channels = Some(chosen);
            Ok(())
        })?;
        let gaussians = positions
            .par_iter()
            .map(|moments| moments.gaussian(self.regularization))
            .collect::<Result<_, _>>()?;
        let density = Positions {
            gaussians,
            channels: channels.ok_or_else(|| Error::NoImages {
                tried: 0,
                first: "there are none".into(),
            })?,
            depth,
        };
        Ok(Scored::boxed(teacher, backbone, density))
    }

    fn layers(&self, depth: usize) -> usize {
        layers_needed(depth)
    }

    fn name(&self) -> String {
        "PaDiM".into()
    }

    fn deviations(&self) -> &'static str {
        "patch tokens of two middle blocks of a ViT in place of three stages of a ResNet; no Gaussian smoothing of the map"
    }
}

impl Padim {
    fn choose(&self, patches: &Tensor, seed: u64) -> Result<Tensor, Error> {
        let all = patches.dim(2)?;
        let kept = self.channels.clamp(1, all);
        let mut chosen = sample(&mut Rng::seed(seed), all, kept).into_vec();
        chosen.sort_unstable();
        let chosen: Vec<u32> = chosen.into_iter().map(|i| i as u32).collect();
        Ok(Tensor::new(chosen, patches.device())?)
    }
}
