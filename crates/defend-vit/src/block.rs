//! A pre-norm transformer block.

use candle_core::{Result, Tensor};
use defend_nn::Rng;
use defend_nn::ops::{self, BlockParameters, BranchFactors};
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
    /// Stochastic depth: factors that leave a branch out for some images of the batch and scale it up for the others. None without
    /// `rng`, which is given only while training, or where nothing is left out.
    pub(crate) fn factors(&self, images: usize, rng: Option<&mut Rng>) -> Option<BranchFactors> {
        let rng = rng.filter(|_| self.drop_path > 0.0)?;
        let keep = 1.0 - self.drop_path;
        let mut draw = || {
            let kept = (0..images).map(|_| rng.random::<f64>() < keep);
            kept.map(|kept| if kept { (1.0 / keep) as f32 } else { 0.0 })
                .collect()
        };
        Some([draw(), draw()])
    }
}
