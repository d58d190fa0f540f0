//! MSAD (Reiss and Hoshen, 2023): the mean-shifted contrastive loss.

use std::sync::Arc;

use candle_core::{D, DType, Tensor};
use defend_core::data::Dataset;
use defend_core::dense::{CropSampler, extract};
use defend_core::nn::Rng;
use defend_core::nn::ops::l2_normalize;
use defend_core::vit::{Encoder, Grid, Vit};
use defend_core::{Error, NoveltyDetector, Observer};
use rand::RngExt;
use serde::{Deserialize, Serialize};

use crate::components::adapted::{BatchLoss, Schedule, cls, fit_adapted};
use crate::components::neighbours::Distance;
use crate::method::cls_of;
use crate::{Method, Teacher};

/// The last blocks are trained to tell images apart by the angles seen from the normal images' mean, while they stay
/// near it; the score is the cosine distance to the nearest neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Msad {
    /// Last blocks that are trained. Paper: two of a ViT.
    pub blocks: usize,
    /// Passes over the images.
    pub epochs: usize,
    /// Images a step. Paper: 64.
    #[serde(alias = "batch")]
    pub batch_size: usize,
    /// Learning rate. Paper: 1e-5.
    pub learning_rate: f64,
    /// Temperature of the contrastive loss. Paper: 0.25.
    pub temperature: f64,
    /// Neighbours that are averaged. Paper: 2.
    pub neighbours: usize,
}

impl Default for Msad {
    fn default() -> Self {
        Self {
            blocks: 2,
            epochs: 5,
            batch_size: 32,
            learning_rate: 1e-5,
            temperature: 0.25,
            neighbours: 2,
        }
    }
}

struct MeanShifted {
    /// Mean of the normal images' unit CLS tokens, `[1, D]`.
    centre: Tensor,
    temperature: f64,
}

impl MeanShifted {
    /// Contrastive loss of two views' unit CLS tokens, `[B, D]` each, seen from the centre, and how far both are
    /// turned from it (equations 5 to 8 of that paper).
    fn of(&self, first: &Tensor, second: &Tensor) -> Result<Tensor, Error> {
        let both = Tensor::cat(&[first, second], 0)?;
        let shifted = l2_normalize(&both.broadcast_sub(&self.centre)?)?;
        let count = shifted.dim(0)?;
        let half = count / 2;
        let scores = (shifted.matmul(&shifted.t()?)? / self.temperature)?;
        // A view is not compared with itself.
        let own = (Tensor::eye(count, DType::F32, scores.device())? * -1e9)?;
        let scores = scores.broadcast_add(&own.to_dtype(scores.dtype())?)?;
        let largest = scores.max_keepdim(D::Minus1)?.detach();
        let log_sum = scores
            .broadcast_sub(&largest)?
            .exp()?
            .sum_keepdim(D::Minus1)?
            .log()?;
        let log_sum = (log_sum + largest)?.squeeze(D::Minus1)?;
        let partners = Tensor::cat(
            &[shifted.narrow(0, half, half)?, shifted.narrow(0, 0, half)?],
            0,
        )?;
        let positive = ((&shifted * partners)?.sum(D::Minus1)? / self.temperature)?;
        let contrastive = (log_sum - positive)?.mean_all()?;
        let direction = l2_normalize(&self.centre)?;
        let angular = both.broadcast_mul(&direction)?.sum(D::Minus1)?.mean_all()?;
        Ok((contrastive - angular)?)
    }
}

impl BatchLoss for MeanShifted {
    fn loss(&self, backbone: &Vit, images: &Tensor, rng: &mut Rng) -> Result<Tensor, Error> {
        let patch = backbone.spec().architecture.patch_size;
        let mut unit = || -> Result<Tensor, Error> {
            let view = augment(images, patch, rng)?;
            Ok(l2_normalize(&cls(backbone, &view)?)?)
        };
        let (first, second) = (unit()?, unit()?);
        self.of(&first, &second)
    }
}

/// A random crop, mirrored half of the time, with other brightness and contrast, grey now and then.
fn augment(images: &Tensor, patch: usize, rng: &mut Rng) -> Result<Tensor, Error> {
    let (b, _, height, width) = images.dims4()?;
    let grid = Grid {
        rows: height / patch,
        columns: width / patch,
    };
    let sampler = CropSampler::new([0.2, 1.0], [0.75, 4.0 / 3.0]);
    let boxes = sampler.boxes(grid, b, rng);
    let crops = extract(images, &boxes, patch, height)?;
    let backwards: Vec<u32> = (0..width as u32).rev().collect();
    let backwards = Tensor::new(backwards, images.device())?;
    let views = (0..b)
        .map(|i| {
            let mut view = crops.get(i)?;
            if rng.random::<f64>() < 0.5 {
                view = view.index_select(&backwards, 2)?;
            }
            if rng.random::<f64>() < 0.8 {
                let mut factor = || 1.0 + 0.4 * (2.0 * rng.random::<f64>() - 1.0);
                let mean = view.mean_all()?;
                // Normalised values have no absolute black: brightness is a shift here.
                let contrast = (view.broadcast_sub(&mean)? * factor())?.broadcast_add(&mean)?;
                view = (contrast + (factor() - 1.0))?;
            }
            if rng.random::<f64>() < 0.2 {
                view = view
                    .mean_keepdim(0)?
                    .broadcast_as(view.shape())?
                    .contiguous()?;
            }
            Ok(view)
        })
        .collect::<Result<Vec<_>, Error>>()?;
    Ok(Tensor::stack(&views, 0)?)
}

impl Method for Msad {
    fn fit(
        &self,
        teacher: &Teacher,
        normal: Arc<dyn Dataset>,
        seed: u64,
        observer: &mut dyn Observer,
    ) -> Result<Box<dyn NoveltyDetector>, Error> {
        let images = teacher.read(normal, observer)?;
        let pretrained = l2_normalize(&cls_of(&*teacher.backbone(1)?, &images)?)?;
        let loss = MeanShifted {
            centre: pretrained.mean_keepdim(0)?,
            temperature: self.temperature,
        };
        let schedule = Schedule {
            blocks: self.blocks,
            epochs: self.epochs,
            batch_size: self.batch_size,
            learning_rate: self.learning_rate,
            weight_decay: 5e-5,
        };
        let nearest = (Distance::Cosine, self.neighbours);
        fit_adapted(teacher, &images, &schedule, &loss, nearest, seed, observer)
    }

    fn name(&self) -> String {
        "MSAD".into()
    }

    fn deviations(&self) -> &'static str {
        "crops on the patch grid; brightness and contrast without hue, no blur; AdamW; few epochs"
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may panic")]

    use candle_core::{Device, Var};

    use super::*;

    fn unit(phase: f64) -> Tensor {
        let values: Vec<f64> = (0..4 * 6)
            .map(|i| (f64::from(i) * 1.3 + phase).sin())
            .collect();
        l2_normalize(&Tensor::from_vec(values, (4, 6), &Device::Cpu).unwrap()).unwrap()
    }

    #[test]
    fn the_loss_has_the_gradient_of_finite_differences() {
        let loss = MeanShifted {
            centre: unit(0.3).mean_keepdim(0).unwrap(),
            temperature: 0.25,
        };
        let second = unit(1.0);
        let first = Var::from_tensor(&unit(0.5)).unwrap();
        let value =
            |first: &Tensor| -> f64 { loss.of(first, &second).unwrap().to_scalar().unwrap() };
        let grads = loss
            .of(first.as_tensor(), &second)
            .unwrap()
            .backward()
            .unwrap();
        let grad = grads
            .get(&first)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f64>()
            .unwrap();
        let start = first.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        for i in [0, 5, 11, 23] {
            let at = |step: f64| {
                let mut moved = start.clone();
                moved[i] += step;
                value(&Tensor::from_vec(moved, (4, 6), &Device::Cpu).unwrap())
            };
            let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
            assert!((grad[i] - numeric).abs() < 1e-6, "{} {numeric}", grad[i]);
        }
    }

    #[test]
    fn equal_views_are_better_than_mixed_up_ones() {
        let loss = MeanShifted {
            centre: unit(0.3).mean_keepdim(0).unwrap(),
            temperature: 0.25,
        };
        let views = unit(0.5);
        let mixed = Tensor::cat(
            &[
                views.narrow(0, 1, 3).unwrap(),
                views.narrow(0, 0, 1).unwrap(),
            ],
            0,
        );
        let value =
            |second: &Tensor| -> f64 { loss.of(&views, second).unwrap().to_scalar().unwrap() };
        assert!(value(&views) < value(&mixed.unwrap()));
    }
}
