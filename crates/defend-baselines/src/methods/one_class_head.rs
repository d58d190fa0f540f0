//! A one-class head on frozen patch tokens, after Deep SVDD (Ruff et al., 2018) and FCDD (Liznerski et al., 2021).

use std::sync::Arc;

use candle_core::{D, DType, Tensor, Var};
use defend_core::data::Dataset;
use defend_core::nn::{Rng, xavier_uniform};
use defend_core::vit::{Backbone, Features, ImageSource};
use defend_core::{Error, Novelty, NoveltyDetector, Observer};
use serde::{Deserialize, Serialize};

use crate::components::adapted::{Schedule, train_by_loss};
use crate::components::scored::{Density, Pool, Scored, mapped};
use crate::{Method, Teacher};

/// Two linear layers without biases on every patch token draw the normal images' patches to one centre; a patch's
/// pseudo-Huber distance to it is its novelty, and the mean over the patches the score.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OneClassHead {
    /// Width between the layers.
    pub hidden: usize,
    /// Width of the output.
    pub output: usize,
    /// Passes over the images.
    pub epochs: usize,
    /// Images a step.
    #[serde(alias = "batch")]
    pub batch_size: usize,
    /// Learning rate.
    pub learning_rate: f64,
    /// Weight decay. Deep SVDD: 1e-6, far from the collapse to a constant.
    pub weight_decay: f64,
}

impl Default for OneClassHead {
    fn default() -> Self {
        Self {
            hidden: 128,
            output: 64,
            epochs: 10,
            batch_size: 32,
            learning_rate: 1e-4,
            weight_decay: 1e-6,
        }
    }
}

struct Head {
    first: Var,
    second: Var,
    centre: Tensor,
}

impl Head {
    /// `[B, N, D]` to `[B, N, output]`.
    fn project(&self, patches: &Tensor) -> Result<Tensor, Error> {
        let hidden = patches.broadcast_matmul(&self.first.t()?)?.relu()?;
        Ok(hidden.broadcast_matmul(&self.second.t()?)?)
    }

    /// Pseudo-Huber distance of each patch to the centre, `[B, N]` (FCDD, equation 2).
    fn distances(&self, patches: &Tensor) -> Result<Tensor, Error> {
        let difference = self.project(patches)?.broadcast_sub(&self.centre)?;
        let squared = difference.sqr()?.sum(D::Minus1)?;
        Ok(((squared + 1.0)?.sqrt()? - 1.0)?)
    }
}

impl Density for Head {
    fn novelties(&self, features: &Features) -> Result<Vec<Novelty>, Error> {
        mapped(
            &self.distances(&features.patches)?.detach(),
            features.grid,
            Pool::Mean,
        )
    }
}

impl Method for OneClassHead {
    fn fit(
        &self,
        teacher: &Teacher,
        normal: Arc<dyn Dataset>,
        seed: u64,
        observer: &mut dyn Observer,
    ) -> Result<Box<dyn NoveltyDetector>, Error> {
        let backbone = teacher.backbone(1)?;
        let images = teacher.read(normal, observer)?;
        let width = backbone.spec().architecture.width;
        let (mut rng, device) = (Rng::seed(seed), teacher.device());
        let mut layer = |output: usize, input: usize| -> Result<Var, Error> {
            Ok(Var::from_tensor(&xavier_uniform(
                output, input, &mut rng, device,
            )?)?)
        };
        let mut head = Head {
            first: layer(self.hidden, width)?,
            second: layer(self.output, self.hidden)?,
            centre: Tensor::zeros(self.output, DType::F32, device)?,
        };
        head.centre = centre(&head, &*backbone, &images)?;
        let parameters = [("first", &head.first), ("second", &head.second)];
        let parameters = parameters.map(|(name, var)| (name.into(), var.clone()));
        let schedule = Schedule {
            blocks: 0,
            epochs: self.epochs,
            batch_size: self.batch_size,
            learning_rate: self.learning_rate,
            weight_decay: self.weight_decay,
        };
        let loss = |batch: &[usize], _: &mut Rng| {
            let features = backbone.features(&images.images(batch)?)?;
            Ok(head.distances(&features.patches)?.mean_all()?)
        };
        let images = images.len();
        train_by_loss(
            parameters.to_vec(),
            images,
            &schedule,
            &mut rng,
            observer,
            &loss,
        )?;
        Ok(Scored::boxed(teacher, backbone, head))
    }

    fn name(&self) -> String {
        "one-class head".into()
    }

    fn deviations(&self) -> &'static str {
        "a head on a frozen ViT's patch tokens in place of a network trained from random weights; no outlier exposure"
    }
}

/// Mean output of the untrained head over all normal patches, the fixed centre; coordinates near zero are moved
/// away from it, since a zero could be reached by weights of zero (authors' code of Deep SVDD).
fn centre(head: &Head, backbone: &dyn Backbone, images: &dyn ImageSource) -> Result<Tensor, Error> {
    const NEAREST: f32 = 0.1;
    let mut sums = Vec::new();
    crate::method::each_batch(backbone, images, |features| {
        sums.push(head.project(&features.patches)?.mean(1)?.detach());
        Ok(())
    })?;
    let mean = Tensor::cat(&sums, 0)?.mean(0)?.to_vec1::<f32>()?;
    let away = |x: f32| {
        if x.abs() < NEAREST {
            NEAREST.copysign(x)
        } else {
            x
        }
    };
    let centre: Vec<f32> = mean.into_iter().map(away).collect();
    Ok(Tensor::new(centre, images.images(&[0])?.device())?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may panic")]

    use candle_core::Device;

    use super::*;

    #[test]
    fn both_layers_have_the_gradient_of_finite_differences() {
        let device = Device::Cpu;
        let tensor = |count: usize, shape: &[usize], phase: f64| {
            let values: Vec<f64> = (0..count).map(|i| (i as f64 * 0.9 + phase).sin()).collect();
            Tensor::from_vec(values, shape, &device).unwrap()
        };
        let patches = tensor(2 * 3 * 5, &[2, 3, 5], 0.1);
        let head = |first: &Tensor, second: &Tensor| Head {
            first: Var::from_tensor(first).unwrap(),
            second: Var::from_tensor(second).unwrap(),
            centre: tensor(2, &[2], 0.7),
        };
        let (first, second) = (tensor(4 * 5, &[4, 5], 0.2), tensor(2 * 4, &[2, 4], 0.3));
        let value = |first: &Tensor, second: &Tensor| -> f64 {
            let distances = head(first, second).distances(&patches).unwrap();
            distances.mean_all().unwrap().to_scalar().unwrap()
        };
        let trained = head(&first, &second);
        let grads = trained
            .distances(&patches)
            .unwrap()
            .mean_all()
            .unwrap()
            .backward()
            .unwrap();
        let check = |var: &Var, at: &dyn Fn(&Tensor) -> f64| {
            let grad = grads
                .get(var)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f64>()
                .unwrap();
            let start = var.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            for i in 0..start.len() {
                let moved = |step: f64| {
                    let mut values = start.clone();
                    values[i] += step;
                    at(&Tensor::from_vec(values, var.shape(), &device).unwrap())
                };
                let numeric = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                assert!((grad[i] - numeric).abs() < 1e-6, "{} {numeric}", grad[i]);
            }
        };
        check(&trained.first, &|first| value(first, &second));
        check(&trained.second, &|second| value(&first, second));
    }
}
