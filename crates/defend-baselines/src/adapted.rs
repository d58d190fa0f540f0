//! Systems that train the teacher's last blocks by a loss on the CLS token, and score by nearest neighbours.

use candle_core::{DType, Tensor};
use defend_core::nn::{AdamW, AdamWConfig, ParameterGroup, Rng, release_memory, shuffled_batches};
use defend_core::vit::{Features, ImageSource, TrainScope, Trainable, Vit};
use defend_core::{Error, Event, Novelty, Observer, Stage, distill};

use crate::Teacher;
use crate::neighbours::Bank;
use crate::scored::{Density, unmapped};

/// Settings of the training.
pub(crate) struct Schedule {
    pub(crate) blocks: usize,
    pub(crate) epochs: usize,
    pub(crate) batch: usize,
    pub(crate) learning_rate: f64,
    pub(crate) weight_decay: f64,
}

/// Role: the loss of a batch of images.
pub(crate) trait BatchLoss {
    fn loss(&self, backbone: &Vit, images: &Tensor, rng: &mut Rng) -> Result<Tensor, Error>;
}

/// A copy of the teacher with its last blocks trained.
pub(crate) fn adapt(
    teacher: &Teacher,
    images: &dyn ImageSource,
    schedule: &Schedule,
    loss: &dyn BatchLoss,
    rng: &mut Rng,
    observer: &mut dyn Observer,
) -> Result<Vit, Error> {
    let blocks = schedule.blocks.min(teacher.depth());
    let backbone = teacher.vit().copy(TrainScope::LastBlocks(blocks))?;
    let group = ParameterGroup {
        parameters: backbone.parameters(),
        learning_rate: schedule.learning_rate,
        weight_decay: schedule.weight_decay,
    };
    let mut optimiser =
        AdamW::new(vec![group], AdamWConfig::default()).map_err(distill::Error::from)?;
    let stage = Stage::Distill;
    observer.on(&Event::Started {
        stage,
        images: (schedule.epochs * images.len()) as u64,
    });
    for _ in 0..schedule.epochs {
        for batch in shuffled_batches(images.len(), schedule.batch, rng) {
            let loss = loss.loss(&backbone, &images.images(&batch)?, rng)?;
            let value = f64::from(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?);
            if !value.is_finite() {
                let step = optimiser.steps();
                return Err(distill::Error::Diverged { step, loss: value }.into());
            }
            optimiser
                .step(&loss.backward()?, 1.0)
                .map_err(distill::Error::from)?;
            observer.on(&Event::Advanced {
                images: batch.len() as u64,
                loss: Some(value),
            });
        }
    }
    observer.on(&Event::Finished { stage });
    release_memory();
    Ok(backbone.copy(TrainScope::Frozen)?)
}

/// CLS tokens with gradients through the trained blocks, `[B, D]`.
pub(crate) fn cls(backbone: &Vit, images: &Tensor) -> Result<Tensor, Error> {
    Ok(backbone
        .features_from(&backbone.frozen_prefix(images)?)?
        .cls)
}

/// Mean distance of the CLS token to its nearest neighbours.
pub(crate) struct NearestCls {
    pub(crate) bank: Bank,
    pub(crate) neighbours: usize,
}

impl Density for NearestCls {
    fn novelties(&self, features: &Features) -> Result<Vec<Novelty>, Error> {
        Ok(unmapped(self.bank.nearest(&features.cls, self.neighbours)?))
    }
}
