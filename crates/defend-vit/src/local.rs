//! Local CLS tokens: what the CLS token would be if it had seen nothing but the surroundings of a patch.

use candle_core::{Result, Tensor};
use defend_nn::ops::{self, BlockParameters};

use crate::Grid;

/// What the CLS token of each patch sees.
pub(crate) struct Surroundings {
    pub(crate) grid: Grid,
    /// Patches in each direction.
    pub(crate) reach: usize,
    /// Place of the first patch among the tokens.
    pub(crate) first_patch: usize,
}

impl Surroundings {
    /// The CLS token of `tokens` `[B, 1 + E + N, D]` at each patch, `[B, N, D]`.
    pub(crate) fn start(&self, tokens: &Tensor) -> Result<Tensor> {
        let (b, _, d) = tokens.dims3()?;
        let cls = tokens.narrow(1, 0, 1)?;
        cls.broadcast_as((b, self.grid.patches(), d))?.contiguous()
    }

    /// The CLS tokens `[B, N, D]` after a block that `tokens` `[B, 1 + E + N, D]` enter.
    pub(crate) fn step(
        &self,
        cls: &Tensor,
        tokens: &Tensor,
        block: &BlockParameters,
    ) -> Result<Tensor> {
        let d = cls.dim(2)?;
        let norm =
            |x: &Tensor, [weight, bias]: &[Tensor; 2]| ops::layer_norm(x, weight, bias, block.eps);
        let linear = |x: &Tensor, [weight, bias]: &[Tensor; 2]| ops::linear(x, weight, bias);
        let patches = tokens.narrow(1, self.first_patch, self.grid.patches())?;
        let own = linear(&norm(cls, &block.norm1)?, &block.qkv)?;
        let [weight, bias] = &block.qkv;
        let keys_and_values = [
            weight.narrow(0, d, 2 * d)?.contiguous()?,
            bias.narrow(0, d, 2 * d)?.contiguous()?,
        ];
        let seen = linear(
            &norm(&patches.contiguous()?, &block.norm1)?,
            &keys_and_values,
        )?;
        let grid = [self.grid.rows, self.grid.columns];
        let attended = ops::local_attention(&own, &seen, block.heads, grid, self.reach)?;
        let branch = |out: Tensor, scale: usize| match &block.scales {
            Some(scales) => out.broadcast_mul(&scales[scale]),
            None => Ok(out),
        };
        let cls = (cls + branch(linear(&attended, &block.projection)?, 0)?)?;
        let [weight, bias] = &block.fc1;
        let hidden = ops::linear_gelu(&norm(&cls, &block.norm2)?, weight, bias)?;
        cls + branch(linear(&hidden, &block.fc2)?, 1)?
    }
}
