//! Methods that train the teacher's last blocks by a loss on the CLS token, and score by nearest neighbours.

use std::ops::ControlFlow;

use std::sync::Arc;

use candle_core::{Tensor, Var};
use defend_core::nn::Rng;
use defend_core::train::{
    AdamW, AdamWConfig, ParameterGroup, Training, TrainingPlan, TrainingStage, TrainingStep, train,
};
use defend_core::vit::{ImageSource, TrainScope, Trainable, Vit};
use defend_core::{Error, Event, NoveltyDetector, Observer, Stage};

use crate::components::neighbours::{Bank, Distance};
use crate::components::scored::Scored;
use crate::method::cls_of;
use crate::methods::simple::Nearest;
use crate::{Teacher, Token};

/// Settings of the training.
pub(crate) struct Schedule {
    pub(crate) blocks: usize,
    pub(crate) epochs: usize,
    pub(crate) batch_size: usize,
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
pub(crate) fn train_by_loss(
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
    let mut optimiser = AdamW::new(vec![group], AdamWConfig::default())?;
    let stage = Stage::Distill;
    observer.on(&Event::Started {
        stage,
        images: (schedule.epochs * images) as u64,
    });
    let plan = TrainingPlan {
        images,
        batch_size: schedule.batch_size,
        epochs: schedule.epochs,
    };
    let mut on_step = |step: TrainingStep| {
        observer.on(&Event::Advanced {
            images: step.images as u64,
            step: Some(step),
        });
        if observer.stops() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    };
    let training = Training::new(rng, &mut on_step);
    train(&mut ByLoss(loss), &mut optimiser, &plan, training)?;
    observer.on(&Event::Finished { stage });
    Ok(())
}

/// A stage that is its loss and nothing else.
struct ByLoss<'a>(&'a Loss<'a>);

impl TrainingStage for ByLoss<'_> {
    type Error = Error;

    fn loss(&mut self, indices: &[usize], rng: &mut Rng) -> Result<Tensor, Error> {
        (self.0)(indices, rng)
    }
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
    train_by_loss(
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
        .features_from_frozen(&backbone.frozen_tokens(images)?)?
        .cls)
}
