//! The loop of every training stage.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::ControlFlow;

use candle_core::{DType, Tensor};
use defend_nn::{Rng, backward, release_memory};
use rand::seq::SliceRandom;

use crate::checkpoint::{Progress, Resumed};
use crate::{AdamW, Checkpoints, Error};

/// What a training stage supplies to [`train`]: the loss of a batch, and what it changes from step to step.
pub trait TrainingStage {
    /// What the stage's own parts return.
    type Error: From<Error> + From<candle_core::Error>;

    /// Called with the order of an epoch's images before its first batch, so that they can be prefetched.
    fn prefetch(&self, order: &[usize]) {
        let _ = order;
    }

    /// Scalar loss of the images `indices`, with gradients for the optimiser's parameters. All randomness comes from `rng`.
    ///
    /// # Errors
    /// Whatever the stage's parts return; the parameters then stay as they are.
    fn loss(&mut self, indices: &[usize], rng: &mut Rng) -> Result<Tensor, Self::Error>;

    /// Called before the update of a step, from 0, of `steps`: sets what the optimiser changes over a run, and returns the multiplier of
    /// all learning rates.
    ///
    /// # Errors
    /// A value that the optimiser does not take.
    fn schedule(
        &self,
        optimiser: &mut AdamW,
        step: usize,
        steps: usize,
    ) -> Result<f64, Self::Error> {
        let _ = (optimiser, step, steps);
        Ok(1.0)
    }

    /// Called after the update of a step.
    ///
    /// # Errors
    /// Whatever the stage's parts return.
    fn after_step(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }

    /// What the stage itself keeps from step to step, beside the optimiser's parameters: moving averages, queues. It goes into
    /// checkpoints. What can be computed again, as caches, does not belong here.
    ///
    /// # Errors
    /// Those of candle.
    fn state(&self) -> Result<BTreeMap<String, Tensor>, Self::Error> {
        Ok(BTreeMap::new())
    }

    /// Takes back what [`TrainingStage::state`] gave, on the CPU.
    ///
    /// # Errors
    /// When a part is missing or does not fit.
    fn restore(&mut self, state: BTreeMap<String, Tensor>) -> Result<(), Self::Error> {
        let _ = state;
        Ok(())
    }
}

/// How much a run trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainingPlan {
    /// Images to train on, at least one.
    pub images: usize,
    /// Images a step; the last step of an epoch may have fewer.
    pub batch_size: usize,
    /// Passes over the images.
    pub epochs: usize,
}

impl TrainingPlan {
    /// Steps of the whole run.
    pub fn steps(&self) -> usize {
        self.epochs * self.images.div_ceil(self.batch_size.max(1))
    }
}

/// State of a training run after a step, for progress displays.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainingStep {
    /// Epoch of this step, from 0.
    pub epoch: usize,
    /// Steps taken, this one included.
    pub step: usize,
    /// Steps of the whole run.
    pub steps: usize,
    /// Images since the last call: those of this step's batch, or all before it when a run is resumed.
    pub images: usize,
    /// Loss of this step's batch.
    pub loss: f64,
    /// Euclidean norm of all gradients of this step together, before they are clipped; 0 where a run is resumed.
    pub gradient_norm: f64,
}

/// What a run did.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingReport {
    /// Mean loss of each epoch, first epoch first.
    pub losses: Vec<f64>,
    /// Steps taken.
    pub steps: usize,
}

/// Hears of every step of a run, and may stop it.
pub type OnStep<'a> = dyn FnMut(TrainingStep) -> ControlFlow<()> + 'a;

/// What a run is given beside its stage: randomness, someone who watches, a place for checkpoints.
pub struct Training<'a> {
    /// Source of all randomness of the run.
    pub rng: &'a mut Rng,
    /// Called after every step; what it answers with [`ControlFlow::Break`] is the last one.
    pub on_step: &'a mut OnStep<'a>,
    /// Where and how often the run is saved; `None`: never.
    pub checkpoints: Option<&'a Checkpoints>,
}

impl<'a> Training<'a> {
    /// A run that is watched and not saved.
    pub fn new(rng: &'a mut Rng, on_step: &'a mut OnStep<'a>) -> Self {
        Self {
            rng,
            on_step,
            checkpoints: None,
        }
    }

    /// Saves the run, and goes on from where it was saved.
    #[must_use]
    pub fn with_checkpoints(mut self, checkpoints: Option<&'a Checkpoints>) -> Self {
        self.checkpoints = checkpoints;
        self
    }
}

impl fmt::Debug for Training<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Training")
            .field("rng", &self.rng)
            .field("checkpoints", &self.checkpoints)
            .finish_non_exhaustive()
    }
}

/// The indices `0..images` in random order, cut into batches; the last may be smaller.
pub fn shuffled_batches(images: usize, batch_size: usize, rng: &mut Rng) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..images).collect();
    order.shuffle(rng);
    let batches = order.chunks(batch_size.max(1));
    batches.map(<[usize]>::to_vec).collect()
}

/// Trains the optimiser's parameters on a stage's loss.
///
/// With checkpoints a run that was stopped at any moment goes on from the last of them and ends with the same bits as one that was not,
/// where a result does not depend on the batch that it was computed in, as caches of a stage are filled anew: on the CPU, not on every
/// GPU.
///
/// # Errors
/// [`Error::NoImages`], [`Error::Diverged`], [`Error::NonFiniteGradient`], [`Error::Stopped`] by `on_step`, what the stage returns, and with checkpoints
/// [`Error::Checkpoint`] and [`Error::Io`].
pub fn train<S: TrainingStage>(
    stage: &mut S,
    optimiser: &mut AdamW,
    plan: &TrainingPlan,
    training: Training<'_>,
) -> Result<TrainingReport, S::Error> {
    let Training {
        rng,
        on_step,
        checkpoints,
    } = training;
    if plan.images == 0 {
        return Err(Error::NoImages.into());
    }
    let steps = plan.steps();
    let mut at = Progress::new(rng);
    let resumed = checkpoints.map(|c| c.resume(optimiser)).transpose()?;
    if let Some(Resumed { progress, state }) = resumed.flatten() {
        stage.restore(state)?;
        *rng = Rng::at(progress.rng);
        at = progress;
        if let Some(loss) = at.last_loss {
            let images = at.losses.len() * plan.images + at.batches_done * plan.batch_size;
            let _ = on_step(TrainingStep {
                epoch: at.losses.len() - usize::from(at.batches_done == 0),
                step: optimiser.steps(),
                steps,
                images: images.min(plan.epochs * plan.images),
                loss,
                gradient_norm: 0.0,
            });
        }
    }
    let mut due = checkpoints.map(Checkpoints::timer);
    let mut stopped = false;
    while at.losses.len() < plan.epochs {
        let batches = if at.batches_done == 0 {
            at.epoch_start = rng.position();
            shuffled_batches(plan.images, plan.batch_size, rng)
        } else {
            shuffled_batches(plan.images, plan.batch_size, &mut Rng::at(at.epoch_start))
        };
        stage.prefetch(&batches[at.batches_done..].concat());
        for indices in &batches[at.batches_done..] {
            let before = rng.position();
            let (value, gradient_norm) = match step(stage, optimiser, indices, steps, rng)? {
                Ok(taken) => taken,
                Err(error) => {
                    // Nothing was changed by this step: the last good state is the present one.
                    if let (Some(checkpoints), true) = (checkpoints, error.batch().is_some()) {
                        at.rng = before;
                        // What went wrong first is told, even if this fails too.
                        let _ = checkpoints.save(&at, optimiser, &stage.state()?);
                    }
                    return Err(error.into());
                }
            };
            stage.after_step()?;
            at.total += value * indices.len() as f64;
            at.batches_done += 1;
            at.last_loss = Some(value);
            let wish = on_step(TrainingStep {
                epoch: at.losses.len(),
                step: optimiser.steps(),
                steps,
                images: indices.len(),
                loss: value,
                gradient_norm,
            });
            let last = at.batches_done == batches.len();
            stopped = wish.is_break();
            if let (Some(checkpoints), Some(due)) = (checkpoints, &mut due)
                && !last
                && (stopped || due.is_over())
            {
                at.rng = rng.position();
                checkpoints.save(&at, optimiser, &stage.state()?)?;
            }
            if stopped && !last {
                let step = optimiser.steps();
                return Err(Error::Stopped { step }.into());
            }
        }
        at.losses.push(at.total / plan.images as f64);
        (at.total, at.batches_done) = (0.0, 0);
        let finished = at.losses.len() == plan.epochs;
        if let (Some(checkpoints), Some(due)) = (checkpoints, &mut due)
            && (finished || stopped || due.is_over())
        {
            at.rng = rng.position();
            checkpoints.save(&at, optimiser, &stage.state()?)?;
        }
        // A run that has come to its end was not stopped.
        if stopped && !finished {
            let step = optimiser.steps();
            return Err(Error::Stopped { step }.into());
        }
    }
    release_memory();
    Ok(TrainingReport {
        losses: at.losses,
        steps,
    })
}

/// Loss and gradient norm of a step on a batch, or why it was not taken: values that are not finite, with the batch.
fn step<S: TrainingStage>(
    stage: &mut S,
    optimiser: &mut AdamW,
    indices: &[usize],
    steps: usize,
    rng: &mut Rng,
) -> Result<Result<(f64, f64), Error>, S::Error> {
    let loss = stage.loss(indices, rng)?;
    let value = f64::from(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?);
    let (step, batch) = (optimiser.steps(), indices.to_vec());
    if !value.is_finite() {
        let (loss, images) = (value, batch);
        return Ok(Err(Error::Diverged { step, loss, images }));
    }
    let multiplier = stage.schedule(optimiser, step, steps)?;
    Ok(match optimiser.step(&backward(&loss)?, multiplier) {
        Ok(norm) => Ok((value, norm)),
        Err(mut error) => {
            if let Error::NonFiniteGradient { images, .. } = &mut error {
                *images = batch;
            }
            Err(error)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_cover_every_image_once() {
        let batches = shuffled_batches(10, 4, &mut Rng::seed(1));
        assert_eq!(batches.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4, 2]);
        let mut all = batches.concat();
        all.sort_unstable();
        assert_eq!(all, (0..10).collect::<Vec<_>>());
    }
}
