//! The dense loss (eq. 1).

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use candle_core::{D, DType, Device, Tensor, Var};
use defend_nn::{Rng, normal, ops};
use defend_ot::Assigner;
use defend_vit::Grid;

use crate::target::crop_targets;
use crate::{Assignment, CropBox, DenseConfig, Error, ProjectionHead, Resampling};

/// Role: targets from views and a loss of their crops, with parameters of its own.
pub trait DenseObjective {
    /// What the crops of a batch should agree with, without a gradient: for the paper, the balanced assignment Q.
    ///
    /// `view`: patch tokens `[B, N, D_v]`; returns `[B, N, K]`.
    ///
    /// # Errors
    /// When the width does not fit, or the features are not finite.
    fn assign(&self, view: &Tensor) -> Result<Tensor, Error>;

    /// Scalar loss, differentiable with respect to `crops` and [`DenseObjective::parameters`].
    ///
    /// `assigned`: what [`DenseObjective::assign`] gave, `[B, N, K]` on `view_grid`; `crops`: patch tokens
    /// `[B * C, M, D_v]` on `crop_grid`, image by image; `boxes`: where they lie, in cells of the view.
    ///
    /// # Errors
    /// When the shapes do not fit.
    fn loss(
        &self,
        assigned: &Tensor,
        view_grid: Grid,
        crops: &Tensor,
        crop_grid: Grid,
        boxes: &[CropBox],
    ) -> Result<Tensor, Error>;

    /// Names and variables that train beside the backbone.
    fn parameters(&self) -> Vec<(String, Var)>;

    /// Called before every step: constraints on the parameters.
    ///
    /// # Errors
    /// [`Error::Candle`] when candle fails.
    fn constrain(&self) -> Result<(), Error> {
        Ok(())
    }

    /// What changes from step to step beside the parameters, for checkpoints.
    ///
    /// # Errors
    /// [`Error::Candle`] when candle fails.
    fn state(&self) -> Result<BTreeMap<String, Tensor>, Error> {
        Ok(BTreeMap::new())
    }

    /// Takes back what [`DenseObjective::state`] gave, on the CPU.
    ///
    /// # Errors
    /// [`Error::Candle`] for what does not fit.
    fn restore(&self, state: BTreeMap<String, Tensor>) -> Result<(), Error> {
        let _ = state;
        Ok(())
    }
}

/// The paper's loss: cross-entropy between the crop's softmax over prototypes and the view's balanced
/// assignment under the crop, `H(softmax(z' p^T / tau), alpha(Q))`.
pub struct PrototypeObjective {
    head: ProjectionHead,
    /// `[K, D]`, rows of unit length before every step.
    prototypes: Var,
    assigner: Box<dyn Assigner>,
    assignment: Assignment,
    resampling: Resampling,
    temperature: f64,
    queue_limit: usize,
    /// Projected patches of earlier batches, newest first, `[Q, D]`.
    queue: Mutex<Option<Tensor>>,
}

impl PrototypeObjective {
    /// A random head and random prototypes for patch tokens of `width` channels.
    ///
    /// # Errors
    /// [`Error::Config`], and [`Error::Candle`] when the parameters cannot be allocated.
    pub fn random(
        config: &DenseConfig,
        width: usize,
        rng: &mut Rng,
        device: &Device,
    ) -> Result<Self, Error> {
        config.validate()?;
        let widths = [&[width][..], &config.head_hidden, &[config.head_output]].concat();
        let head = ProjectionHead::random(&widths, rng, device)?;
        let prototypes = normal((config.prototypes, config.head_output), 1.0, rng, device)?;
        Ok(Self::new(
            head,
            &prototypes,
            Box::new(config.sinkhorn),
            config.assignment,
            config.temperature,
        )?
        .with_resampling(config.resampling)
        .with_queue(config.queue))
    }

    /// From a head, prototypes `[K, D]` and any [`Assigner`].
    ///
    /// # Errors
    /// [`Error::Candle`] when candle fails.
    pub fn new(
        head: ProjectionHead,
        prototypes: &Tensor,
        assigner: Box<dyn Assigner>,
        assignment: Assignment,
        temperature: f64,
    ) -> Result<Self, Error> {
        Ok(Self {
            head,
            prototypes: Var::from_tensor(&ops::l2_normalize(prototypes)?)?,
            assigner,
            assignment,
            resampling: Resampling::Area,
            temperature,
            queue_limit: 0,
            queue: Mutex::new(None),
        })
    }

    /// Another way to bring targets and crops to one grid; by area without it.
    #[must_use]
    pub fn with_resampling(mut self, resampling: Resampling) -> Self {
        self.resampling = resampling;
        self
    }

    /// Lets up to `patches` patches of earlier batches take part in the assignment (SwAV, section 3.2: for
    /// batches that are small against the number of prototypes).
    #[must_use]
    pub fn with_queue(mut self, patches: usize) -> Self {
        self.queue_limit = patches;
        self
    }

    /// Cosines of unit vectors `[.., D]` with the prototypes: `[rows, K]`.
    fn scores(z: &Tensor, prototypes: &Tensor) -> Result<Tensor, Error> {
        let width = z.dim(D::Minus1)?;
        Ok(z.reshape(((), width))?.matmul(&prototypes.t()?)?)
    }

    /// Rows of `z` `[R, D]` followed by the queue, which then takes them in.
    fn queued(&self, z: &Tensor) -> Result<Tensor, Error> {
        if self.queue_limit == 0 {
            return Ok(z.clone());
        }
        // A poisoned lock means that another thread panicked between two reads: the tensor is whole all the same.
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let all = match queue.take() {
            Some(earlier) => Tensor::cat(&[z, &earlier], 0)?,
            None => z.clone(),
        };
        *queue = Some(all.narrow(0, 0, all.dim(0)?.min(self.queue_limit))?);
        Ok(all)
    }
}

impl DenseObjective for PrototypeObjective {
    fn assign(&self, view: &Tensor) -> Result<Tensor, Error> {
        let (b, n, _) = view.dims3()?;
        let z = self.head.forward_detached(view)?.flatten_to(1)?;
        let scores = Self::scores(&self.queued(&z)?, &self.prototypes.as_detached_tensor())?;
        let q = self.assigner.assign(&scores)?;
        Ok(q.narrow(0, 0, b * n)?.reshape((b, n, ()))?)
    }

    fn loss(
        &self,
        assigned: &Tensor,
        view_grid: Grid,
        crops: &Tensor,
        crop_grid: Grid,
        boxes: &[CropBox],
    ) -> Result<Tensor, Error> {
        let targets = crop_targets(
            assigned,
            boxes,
            view_grid,
            crop_grid,
            self.assignment,
            self.resampling,
        )?;
        let z = self.head.forward(crops)?;
        let scores = (Self::scores(&z, self.prototypes.as_tensor())? / self.temperature)?;
        let scores = scores.reshape((boxes.len(), crop_grid.patches(), ()))?;
        let scores = self.resampling.scores(&scores, crop_grid)?;
        let log_p = candle_nn::ops::log_softmax(&scores.to_dtype(DType::F32)?, D::Minus1)?;
        let targets = targets.to_dtype(DType::F32)?;
        Ok((log_p * targets)?.sum(D::Minus1)?.mean_all()?.neg()?)
    }

    fn parameters(&self) -> Vec<(String, Var)> {
        let mut parameters = self.head.parameters();
        parameters.push(("prototypes".into(), self.prototypes.clone()));
        parameters
    }

    fn constrain(&self) -> Result<(), Error> {
        let unit = ops::l2_normalize(&self.prototypes.as_detached_tensor())?;
        Ok(self.prototypes.set(&unit)?)
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>, Error> {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let queue = queue.iter().map(|queue| ("queue".into(), queue.clone()));
        Ok(queue.collect())
    }

    fn restore(&self, mut state: BTreeMap<String, Tensor>) -> Result<(), Error> {
        let queue = state.remove("queue");
        let queue = queue.map(|queue| queue.to_device(self.prototypes.device()));
        *self.queue.lock().unwrap_or_else(PoisonError::into_inner) = queue.transpose()?;
        Ok(())
    }
}
