//! A pre-norm transformer block.

use candle_core::{Result, Tensor};
use defend_nn::Rng;
use defend_nn::ops::{self, BlockParameters};
use rand::RngExt;

/// Weight `[O, I]` and bias `[O]` of an affine map.
#[derive(Debug)]
pub(crate) struct Linear {
    pub(crate) weight: Tensor,
    pub(crate) bias: Tensor,
}

impl Linear {
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::linear(x, &self.weight, &self.bias)
    }
}

/// Scale and shift of a LayerNorm.
#[derive(Debug)]
pub(crate) struct Norm {
    pub(crate) weight: Tensor,
    pub(crate) bias: Tensor,
    pub(crate) eps: f64,
}

impl Norm {
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm(x, &self.weight, &self.bias, self.eps)
    }
}

/// Attention and MLP with the student's stochastic depth.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) parameters: BlockParameters,
    /// Probability of leaving a residual branch out while training, `0..1`.
    pub(crate) drop_path: f64,
}

impl Block {
    /// `[B, T, D]` to `[B, T, D]`, and if need be the attention of the CLS token to the others, `[B, h, T - 1]`, which carries
    /// no gradient; `rng` draws stochastic depth and is given only while training.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        rng: Option<&mut Rng>,
        with_cls_attention: bool,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let factors = self.factors(x, rng)?;
        ops::transformer_block(x, &self.parameters, factors.as_ref(), with_cls_attention)
    }

    /// Stochastic depth: leaves a branch out for some images of the batch and scales it up for the others.
    fn factors(&self, x: &Tensor, rng: Option<&mut Rng>) -> Result<Option<[Vec<f32>; 2]>> {
        let (Some(rng), true) = (rng, self.drop_path > 0.0) else {
            return Ok(None);
        };
        let (images, keep) = (x.dim(0)?, 1.0 - self.drop_path);
        let mut draw = || {
            let kept = (0..images).map(|_| rng.random::<f64>() < keep);
            kept.map(|kept| if kept { (1.0 / keep) as f32 } else { 0.0 })
                .collect()
        };
        Ok(Some([draw(), draw()]))
    }
}
