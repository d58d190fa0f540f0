//! PANDA (Reiss et al., 2021) with its feature adaptation, stopped early.

use std::sync::Arc;

use candle_core::{D, Tensor};
use defend_core::data::Dataset;
use defend_core::nn::Rng;
use defend_core::vit::Vit;
use defend_core::{Error, NoveltyDetector, Observer};
use serde::{Deserialize, Serialize};

use crate::components::adapted::{BatchLoss, Schedule, cls, fit_adapted};
use crate::components::neighbours::Distance;
use crate::method::cls_of;
use crate::{Method, Teacher};

/// The last blocks are trained to draw the normal images' CLS tokens to their mean, for so few epochs that they do
/// not collapse; the score is the distance to the nearest neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Panda {
    /// Last blocks that are trained. Paper: the last two stages of a ResNet.
    pub blocks: usize,
    /// Passes over the images, the early stop. Paper: 15 epochs at most.
    pub epochs: usize,
    /// Images a step. Paper: 32.
    #[serde(alias = "batch")]
    pub batch_size: usize,
    /// Learning rate. Paper: 1e-2 with SGD, and small for AdamW here.
    pub learning_rate: f64,
    /// Neighbours that are averaged. Paper: 2.
    pub neighbours: usize,
}

impl Default for Panda {
    fn default() -> Self {
        Self {
            blocks: 2,
            epochs: 5,
            batch_size: 32,
            learning_rate: 1e-5,
            neighbours: 2,
        }
    }
}

/// Mean squared distance to a fixed centre.
struct Compactness {
    centre: Tensor,
}

impl BatchLoss for Compactness {
    fn loss(&self, backbone: &Vit, images: &Tensor, _rng: &mut Rng) -> Result<Tensor, Error> {
        let difference = cls(backbone, images)?.broadcast_sub(&self.centre)?;
        Ok(difference.sqr()?.sum(D::Minus1)?.mean_all()?)
    }
}

impl Method for Panda {
    fn fit(
        &self,
        teacher: &Teacher,
        normal: Arc<dyn Dataset>,
        seed: u64,
        observer: &mut dyn Observer,
    ) -> Result<Box<dyn NoveltyDetector>, Error> {
        let images = teacher.read(normal, observer)?;
        let pretrained = cls_of(&*teacher.backbone(1)?, &images)?;
        let loss = Compactness {
            centre: pretrained.mean_keepdim(0)?,
        };
        let schedule = Schedule {
            blocks: self.blocks,
            epochs: self.epochs,
            batch_size: self.batch_size,
            learning_rate: self.learning_rate,
            weight_decay: 5e-5,
        };
        let nearest = (Distance::Squared, self.neighbours);
        fit_adapted(teacher, &images, &schedule, &loss, nearest, seed, observer)
    }

    fn name(&self) -> String {
        "PANDA".into()
    }

    fn deviations(&self) -> &'static str {
        "CLS token and last blocks of a ViT in place of a ResNet; AdamW; stopped after fixed epochs (no elastic weight \
         consolidation)"
    }
}
