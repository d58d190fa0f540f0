//! A pre-norm transformer block.

use candle_core::{Result, Tensor};
use defend_nn::{Rng, ops};
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

/// Attention and MLP, each behind a LayerNorm and around a residual connection.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) norm1: Norm,
    pub(crate) qkv: Linear,
    pub(crate) projection: Linear,
    pub(crate) norm2: Norm,
    pub(crate) fc1: Linear,
    pub(crate) fc2: Linear,
    pub(crate) heads: usize,
    /// Factors `[D]` of the attention's and the MLP's branch.
    pub(crate) scales: Option<[Tensor; 2]>,
    /// Probability of leaving a residual branch out while training, `0..1`.
    pub(crate) drop_path: f64,
}

impl Block {
    /// `[B, T, D]` to `[B, T, D]`; `rng` draws stochastic depth and is given only while training.
    pub(crate) fn forward(&self, x: &Tensor, rng: Option<&mut Rng>) -> Result<Tensor> {
        self.residual(x, &self.qkv(x)?, rng)
    }

    /// As [`Block::forward`], and the attention of the CLS token to the others, `[B, h, T - 1]`, which
    /// carries no gradient.
    pub(crate) fn forward_with_cls_attention(
        &self,
        x: &Tensor,
        rng: Option<&mut Rng>,
    ) -> Result<(Tensor, Tensor)> {
        let qkv = self.qkv(x)?;
        let attention = ops::cls_attention(&qkv.detach(), self.heads)?;
        Ok((self.residual(x, &qkv, rng)?, attention))
    }

    /// Both residual branches, the first from its packed queries, keys and values.
    fn residual(&self, x: &Tensor, qkv: &Tensor, mut rng: Option<&mut Rng>) -> Result<Tensor> {
        let branch = self.projection.forward(&ops::attention(qkv, self.heads)?)?;
        let branch = self.scaled(branch, 0)?;
        let x = (x + self.drop_path(branch, rng.as_deref_mut())?)?;
        let hidden = ops::linear_gelu(&self.norm2.forward(&x)?, &self.fc1.weight, &self.fc1.bias)?;
        let branch = self.scaled(self.fc2.forward(&hidden)?, 1)?;
        &x + self.drop_path(branch, rng)?
    }

    fn scaled(&self, branch: Tensor, which: usize) -> Result<Tensor> {
        match &self.scales {
            Some(scales) => branch.broadcast_mul(&scales[which]),
            None => Ok(branch),
        }
    }

    fn qkv(&self, x: &Tensor) -> Result<Tensor> {
        self.qkv.forward(&self.norm1.forward(x)?)
    }

    /// Stochastic depth: zeroes a branch for some images of the batch and scales the others up.
    fn drop_path(&self, branch: Tensor, rng: Option<&mut Rng>) -> Result<Tensor> {
        let (Some(rng), true) = (rng, self.drop_path > 0.0) else {
            return Ok(branch);
        };
        let keep = 1.0 - self.drop_path;
        let images = branch.dim(0)?;
        let factors: Vec<f32> = (0..images)
            .map(|_| {
                if rng.random::<f64>() < keep {
                    (1.0 / keep) as f32
                } else {
                    0.0
                }
            })
            .collect();
        let factors = Tensor::from_vec(factors, (images, 1, 1), branch.device())?;
        branch.broadcast_mul(&factors.to_dtype(branch.dtype())?)
    }
}
