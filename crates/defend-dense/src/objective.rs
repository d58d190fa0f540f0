//! The dense loss (eq. 1).

use candle_core::{D, DType, Device, Tensor, Var};
use defend_nn::{Rng, normal, ops};
use defend_ot::Assigner;
use defend_vit::Grid;

use crate::target::crop_targets;
use crate::{Assignment, CropBox, DenseConfig, Error, ProjectionHead};

/// Role: a loss between the patches of a view and of its crops, with parameters of its own.
pub trait DenseObjective {
    /// Scalar loss, differentiable with respect to `crops` and [`DenseObjective::parameters`].
    ///
    /// `view`: patch tokens `[B, N, D_v]` on `view_grid`; `crops`: `[B * C, M, D_v]` on `crop_grid`, image
    /// by image; `boxes`: where they lie, in cells of the view.
    ///
    /// # Errors
    /// When the shapes do not fit.
    fn loss(
        &self,
        view: &Tensor,
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
}

/// The paper's loss: cross-entropy between the crop's softmax over prototypes and the view's balanced
/// assignment under the crop, `H(softmax(z' p^T / tau), alpha(Q))`.
pub struct PrototypeObjective {
    head: ProjectionHead,
    /// `[K, D]`, rows of unit length before every step.
    prototypes: Var,
    assigner: Box<dyn Assigner>,
    assignment: Assignment,
    temperature: f64,
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
        Self::new(
            head,
            &prototypes,
            Box::new(config.sinkhorn),
            config.assignment,
            config.temperature,
        )
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
            temperature,
        })
    }

    /// Cosines of unit vectors `[.., D]` with the prototypes: `[rows, K]`.
    fn scores(z: &Tensor, prototypes: &Tensor) -> Result<Tensor, Error> {
        let width = z.dim(D::Minus1)?;
        Ok(z.reshape(((), width))?.matmul(&prototypes.t()?)?)
    }

    /// Balanced assignment Q of all patches of the batch, `[B, N, K]`, without a gradient.
    ///
    /// # Errors
    /// When the width does not fit, or the features are not finite.
    pub fn assign(&self, view: &Tensor) -> Result<Tensor, Error> {
        let (b, n, _) = view.dims3()?;
        let z = self.head.forward_detached(view)?;
        let scores = Self::scores(&z, &self.prototypes.as_detached_tensor())?;
        let q = self.assigner.assign(&scores)?;
        Ok(q.reshape((b, n, ()))?)
    }
}

impl DenseObjective for PrototypeObjective {
    fn loss(
        &self,
        view: &Tensor,
        view_grid: Grid,
        crops: &Tensor,
        crop_grid: Grid,
        boxes: &[CropBox],
    ) -> Result<Tensor, Error> {
        let q = self.assign(view)?;
        let targets = crop_targets(&q, boxes, view_grid, crop_grid, self.assignment)?;
        let z = self.head.forward(crops)?;
        let scores = (Self::scores(&z, self.prototypes.as_tensor())? / self.temperature)?;
        let log_p = candle_nn::ops::log_softmax(&scores.to_dtype(DType::F32)?, D::Minus1)?;
        let targets = targets.reshape(log_p.dims())?.to_dtype(DType::F32)?;
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
}
