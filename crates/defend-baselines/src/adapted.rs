//! Systems that train the teacher's last blocks by a loss on the CLS token, and score by nearest neighbours.

use std::sync::Arc;

use candle_core::{DType, Tensor, Var};
use defend_core::nn::{
    AdamW, AdamWConfig, ParameterGroup, Rng, backward, release_memory, shuffled_batches,
};
use defend_core::vit::{ImageSource, TrainScope, Trainable, Vit};
use defend_core::{Error, Event, NoveltyDetector, Observer, Stage, distill};

use crate::neighbours::{Bank, Distance};
use crate::scored::Scored;
use crate::simple::Nearest;
use crate::system::cls_of;
use crate::{Teacher, Token};

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

/// The loss of a batch of images, by index.
type Loss<'a> = dyn Fn(&[usize], &mut Rng) -> Result<Tensor, Error> + 'a;

/// Trains `parameters` by AdamW over shuffled batches of images.
pub(crate) fn train(
    parameters: Vec<(String, Var)>,
    images: usize,
    schedule: &Schedule,
    rng: &mut Rng,
    observer: &mut dyn Observer,
    loss: &Loss<'_>,
) -> Result<(), Error> {
    let group = ParameterGroup {
        parameters,
        learning_rate: schedule.learning_rate,
        weight_decay: schedule.weight_decay,
    };
    let mut optimiser =
        AdamW::new(vec![group], AdamWConfig::default()).map_err(distill::Error::from)?;
    let stage = Stage::Distill;
    observer.on(&Event::Started {
        stage,
        images: (schedule.epochs * images) as u64,
    });
    for _ in 0..schedule.epochs {
        for batch in shuffled_batches(images, schedule.batch, rng) {
            let loss = loss(&batch, rng)?;
            let value = f64::from(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?);
            if !value.is_finite() {
                let step = optimiser.steps();
                return Err(distill::Error::Diverged { step, loss: value }.into());
            }
            optimiser
                .step(&backward(&loss)?, 1.0)
                .map_err(distill::Error::from)?;
            observer.on(&Event::Advanced {
                images: batch.len() as u64,
                loss: Some(value),
            });
        }
    }
    observer.on(&Event::Finished { stage });
    release_memory();
    Ok(())
}

/// A detector by nearest neighbours on a copy of the teacher with its last blocks trained.
pub(crate) fn fit_adapted(
    teacher: &Teacher,
    images: &dyn ImageSource,
    schedule: &Schedule,
    loss: &dyn BatchLoss,
    nearest: (Distance, usize),
    seed: u64,
    observer: &mut dyn Observer,
) -> Result<Box<dyn NoveltyDetector>, Error> {
    let blocks = schedule.blocks.min(teacher.depth());
    let backbone = teacher.vit().copy(TrainScope::LastBlocks(blocks))?;
    let of_batch =
        |batch: &[usize], rng: &mut Rng| loss.loss(&backbone, &images.images(batch)?, rng);
    train(
        backbone.parameters(),
        images.len(),
        schedule,
        &mut Rng::seed(seed),
        observer,
        &of_batch,
    )?;
    let backbone = backbone.copy(TrainScope::Frozen)?;
    let (distance, neighbours) = nearest;
    let bank = Bank::new(&cls_of(&backbone, images)?, distance)?;
    let density = Nearest::new(bank, neighbours, Token::Cls);
    Ok(Scored::boxed(teacher, Arc::new(backbone), density))
}

/// CLS tokens with gradients through the trained blocks, `[B, D]`.
pub(crate) fn cls(backbone: &Vit, images: &Tensor) -> Result<Tensor, Error> {
    Ok(backbone
        .features_from(&backbone.frozen_prefix(images)?)?
        .cls)
}
