//! The Vision Transformer: embedding, blocks, features.

use std::collections::HashMap;

use candle_core::{Tensor, Var};
use defend_nn::Rng;
use defend_nn::ops::{self, BranchFactors};

use crate::block::{Block, Linear, Norm};
use crate::features::{
    Backbone, Encoder, Features, FrozenTokens, Grid, Layer, TokenSet, Trainable,
};
use crate::local::Surroundings;
use crate::patch_embed::patchify;
use crate::pos_embed::Bicubic;
use crate::{BackboneSpec, Error, pos_embed};

/// Which parameters of a loaded backbone train.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrainScope {
    /// None: a teacher or a feature extractor.
    Frozen,
    /// The last blocks, not the final norm (paper, section 3; authors' code).
    LastBlocks(usize),
    /// Everything.
    All,
}

/// A plain Vision Transformer with a CLS token, a learned or fixed positional embedding, and pre-norm
/// blocks (METHOD.md, section 0); DeiT's distillation token, DINOv2's registers and LayerScale where the
/// checkpoint has them.
#[derive(Debug)]
pub struct Vit {
    pub(crate) spec: BackboneSpec,
    /// Weight `[D, 3, P, P]`.
    pub(crate) patch_embed: Linear,
    /// `[1, 1, D]`.
    pub(crate) cls_token: Tensor,
    /// DeiT's distillation token, `[1, 1, D]`.
    pub(crate) dist_token: Option<Tensor>,
    /// DINOv2's registers, `[1, R, D]`.
    pub(crate) reg_token: Option<Tensor>,
    /// Of the CLS token, a distillation token, and the full view's patches, `[1, 1 + N, D]` or `[1, 2 + N, D]`.
    pub(crate) pos_embed: Tensor,
    pub(crate) blocks: Vec<Block>,
    pub(crate) norm: Norm,
    pub(crate) head: Option<Linear>,
    /// Of the distillation token.
    pub(crate) head_dist: Option<Linear>,
    pub(crate) variables: Vec<(String, Var)>,
    /// Index of the first block that trains: everything below may be cached.
    pub(crate) first_trained: usize,
}

impl Vit {
    /// Blocks that may run once and be cached: neither trained nor a layer of the features.
    fn frozen_blocks(&self) -> usize {
        self.first_trained.min(self.blocks.len() - self.spec.layers)
    }

    /// Class logits of images, `[B, classes]`, for a checkpoint with a head; with a distillation token the
    /// mean of both heads, as DeiT does.
    ///
    /// # Errors
    /// [`Error::Config`] without a head, [`Error::Input`] for images that do not fit.
    pub fn logits(&self, images: &Tensor) -> Result<Tensor, Error> {
        let head = self.head.as_ref().ok_or_else(|| Error::Config {
            origin: self.spec.name.clone(),
            reason: "the backbone was loaded without its classification head".into(),
        })?;
        let (tokens, _) = self.embed(images, None)?;
        let (tokens, _) = through(&self.blocks, &tokens, &[], false)?;
        let tokens = self.norm.forward(
            &tokens
                .narrow(1, 0, self.spec.architecture.num_prefix_tokens())?
                .contiguous()?,
        )?;
        let token = |i| tokens.narrow(1, i, 1)?.squeeze(1)?.contiguous();
        let logits = head.forward(&token(0)?)?;
        match &self.head_dist {
            Some(head_dist) => Ok(((logits + head_dist.forward(&token(1)?)?)? / 2.0)?),
            None => Ok(logits),
        }
    }

    /// The tokens that enter each of the last `blocks` blocks and those that leave the last one, before the final norm:
    /// `blocks + 1` times `[B, 1 + E + N, D]` with E extra tokens.
    ///
    /// # Errors
    /// [`Error::Config`] for more blocks than there are, [`Error::Input`] for images that do not fit.
    pub fn block_tokens(&self, images: &Tensor, blocks: usize) -> Result<Vec<Tensor>, Error> {
        let Some(first) = self.blocks.len().checked_sub(blocks) else {
            return Err(self.no_block(blocks));
        };
        let (tokens, _) = self.embed(images, None)?;
        let (mut tokens, _) = through(&self.blocks[..first], &tokens, &[], false)?;
        let mut all = vec![tokens.clone()];
        for block in self.blocks[first..].chunks(1) {
            (tokens, _) = through(block, &tokens, &[], false)?;
            all.push(tokens.clone());
        }
        Ok(all)
    }

    /// One block alone, as at test time: `[B, T, D]` to `[B, T, D]`, with gradients to its parameters where it trains.
    ///
    /// # Errors
    /// [`Error::Config`] for a block that there is not, [`Error::Candle`] for tokens of another width.
    pub fn run_block(&self, index: usize, tokens: &Tensor) -> Result<Tensor, Error> {
        match self.blocks.get(index..=index) {
            Some(block) => Ok(through(block, tokens, &[], false)?.0),
            None => Err(self.no_block(index + 1)),
        }
    }

    /// Tokens of some blocks as [`Encoder::intermediates`] gives them, and *local CLS tokens*, `[B, N, D]` after the final norm.
    ///
    /// The local CLS token of a patch is the CLS token that enters the block `from` (from 0), run through the rest of the blocks
    /// once more with attention to nothing but itself and the patches up to `reach` rows and columns away. The patches are those
    /// of the whole image's pass. Without a gradient.
    ///
    /// # Errors
    /// As [`Encoder::intermediates`]; [`Error::Config`] for a first block that there is not.
    pub fn layers_and_local_cls(
        &self,
        images: &Tensor,
        blocks: &[usize],
        from: usize,
        reach: usize,
    ) -> Result<(Vec<Layer>, Tensor), Error> {
        self.check_blocks(blocks)?;
        if from >= self.blocks.len() {
            return Err(self.no_block(from + 1));
        }
        let (mut tokens, grid) = self.embed(images, None)?;
        let surroundings = Surroundings {
            grid,
            reach,
            first_patch: self.spec.architecture.num_prefix_tokens(),
        };
        let (mut layers, mut local, mut first) = (Vec::with_capacity(blocks.len()), None, 0);
        for (i, block) in self.blocks.iter().enumerate() {
            if i >= from {
                let cls = match local {
                    None => surroundings.start(&tokens)?,
                    Some(cls) => cls,
                };
                local = Some(surroundings.step(&cls, &tokens, &block.parameters)?);
            }
            let wanted = blocks.contains(&i);
            // Blocks run together up to one whose output is asked for.
            if wanted || i + 1 >= from {
                (tokens, _) = through(&self.blocks[first..=i], &tokens, &[], false)?;
                first = i + 1;
            }
            if wanted {
                layers.push(self.layer(&tokens)?);
            }
        }
        let local = local.ok_or_else(|| self.no_block(from + 1))?;
        Ok((layers, self.norm.forward(&local)?))
    }

    fn check_blocks(&self, blocks: &[usize]) -> Result<(), Error> {
        let ascending = blocks.is_sorted_by(|a, b| a < b);
        if ascending && blocks.last().is_none_or(|last| *last < self.blocks.len()) {
            return Ok(());
        }
        Err(Error::Config {
            origin: self.spec.name.clone(),
            reason: format!(
                "the blocks {blocks:?} were asked for, expected ascending numbers below {}",
                self.blocks.len()
            ),
        })
    }

    fn no_block(&self, asked: usize) -> Error {
        Error::Config {
            origin: self.spec.name.clone(),
            reason: format!(
                "{asked} blocks were asked for, there are {}",
                self.blocks.len()
            ),
        }
    }

    /// The tokens that enter the first block, `[B, 1 + E + N, D]` with E extra tokens (M for N when kept).
    fn embed(&self, images: &Tensor, keep: Option<&TokenSet>) -> Result<(Tensor, Grid), Error> {
        let arch = &self.spec.architecture;
        let images = images.to_dtype(self.cls_token.dtype())?;
        // Dropping patches before they are embedded gives the same tokens and costs nothing for them.
        let (patches, grid) = patchify(&images, arch.patch_size, keep)?;
        let (b, d) = (patches.dim(0)?, arch.width);
        let pos_embed = self.pos_embed.squeeze(0)?;
        let cls_position = pos_embed.narrow(0, 0, 1)?;
        let patches_from = arch.first_patch_position();
        let positions = pos_embed.narrow(0, patches_from, arch.grid().patches())?;
        let filter = Bicubic::new(arch);
        let positions = pos_embed::resize(&positions, arch.grid(), grid, filter)?;
        let kernel = self.patch_embed.weight.reshape((d, arch.patch_values()))?;
        let patches = ops::linear(&patches, &kernel, &self.patch_embed.bias)?;
        let patches = match keep {
            None => {
                let images = patches.reshape((b, positions.elem_count()))?;
                ops::add_bias(&images, &positions.flatten_all()?)?.reshape(patches.shape())?
            }
            Some(keep) => {
                let kept = keep.indices().flatten_all()?;
                (&patches + ops::pick_rows(&positions, &kept)?.reshape((b, (), d))?)?
            }
        };
        let cls = self
            .cls_token
            .broadcast_add(&cls_position)?
            .broadcast_as((b, 1, d))?;
        let mut tokens = vec![cls];
        if let Some(dist) = &self.dist_token {
            let dist = dist.broadcast_add(&pos_embed.narrow(0, 1, 1)?)?;
            tokens.push(dist.broadcast_as((b, 1, d))?);
        }
        if let Some(registers) = &self.reg_token {
            tokens.push(registers.broadcast_as((b, arch.registers, d))?);
        }
        tokens.push(patches);
        Ok((Tensor::cat(&tokens, 1)?, grid))
    }

    /// Runs blocks `from..` and the final norm.
    fn finish(
        &self,
        tokens: &Tensor,
        from: usize,
        grid: Grid,
        mut rng: Option<&mut Rng>,
    ) -> Result<Features, Error> {
        let (mut tokens, mut attention) = (tokens.clone(), None);
        let images = tokens.dim(0)?;
        let (mut earlier, mut factors) = (Vec::new(), Vec::new());
        let mut first = from;
        for (i, block) in self.blocks.iter().enumerate().skip(from) {
            let last = i + 1 == self.blocks.len();
            factors.push(block.factors(images, rng.as_deref_mut()));
            // Blocks run together up to one whose output is asked for.
            if i + self.spec.layers < self.blocks.len() {
                continue;
            }
            (tokens, attention) = through(&self.blocks[first..=i], &tokens, &factors, last)?;
            factors.clear();
            first = i + 1;
            if !last {
                earlier.push(self.layer(&tokens)?);
            }
        }
        earlier.reverse();
        let cls_attention = attention.ok_or_else(|| Error::Config {
            origin: self.spec.name.clone(),
            reason: "features need at least one block after the frozen prefix".into(),
        })?;
        let extra = self.spec.architecture.num_prefix_tokens() - 1;
        let seen = cls_attention.dim(2)? - extra;
        let cls_attention = cls_attention.narrow(2, extra, seen)?.contiguous()?;
        let Layer { cls, patches } = self.layer(&tokens)?;
        Ok(Features {
            cls,
            patches,
            cls_attention,
            grid,
            intermediates: earlier,
        })
    }

    /// A block's output `[B, 1 + E + N, D]` through the final norm.
    ///
    /// # Errors
    /// [`Error::Candle`] for tokens of another width.
    pub fn layer(&self, tokens: &Tensor) -> Result<Layer, Error> {
        let tokens = self.norm.forward(tokens)?;
        let first_patch = self.spec.architecture.num_prefix_tokens();
        let patches = tokens.dim(1)? - first_patch;
        Ok(Layer {
            // candle multiplies no rows with gaps on CUDA.
            cls: tokens.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?,
            patches: tokens.narrow(1, first_patch, patches)?.contiguous()?,
        })
    }
}

/// Runs blocks, with factors of their branches or none at all, and with the attention of the last one's CLS token to the others if
/// need be.
fn through(
    blocks: &[Block],
    tokens: &Tensor,
    factors: &[Option<BranchFactors>],
    with_cls_attention: bool,
) -> Result<(Tensor, Option<Tensor>), Error> {
    let parameters: Vec<_> = blocks.iter().map(|block| &block.parameters).collect();
    let found = ops::transformer_blocks(tokens, &parameters, factors, with_cls_attention)?;
    Ok(found)
}

impl Encoder for Vit {
    fn spec(&self) -> &BackboneSpec {
        &self.spec
    }

    fn intermediates(&self, images: &Tensor, blocks: &[usize]) -> Result<Vec<Layer>, Error> {
        self.check_blocks(blocks)?;
        let (mut tokens, _) = self.embed(images, None)?;
        let (mut first, mut layers) = (0, Vec::with_capacity(blocks.len()));
        for &block in blocks {
            (tokens, _) = through(&self.blocks[first..=block], &tokens, &[], false)?;
            first = block + 1;
            layers.push(self.layer(&tokens)?);
        }
        Ok(layers)
    }

    /// The local CLS tokens are of the last third of the blocks and 5 x 5 patches.
    fn intermediates_and_local(
        &self,
        images: &Tensor,
        blocks: &[usize],
    ) -> Result<(Vec<Layer>, Option<Tensor>), Error> {
        let depth = self.blocks.len();
        let (layers, local) =
            self.layers_and_local_cls(images, blocks, depth - depth.div_ceil(3), 2)?;
        Ok((layers, Some(local)))
    }

    fn tensors(&self) -> Result<Option<HashMap<String, Tensor>>, Error> {
        self.state_dict().map(Some)
    }
}

impl Backbone for Vit {
    fn features(&self, images: &Tensor) -> Result<Features, Error> {
        let (tokens, grid) = self.embed(images, None)?;
        self.finish(&tokens, 0, grid, None)
    }

    fn features_masked(&self, images: &Tensor, keep: &TokenSet) -> Result<Features, Error> {
        let (tokens, grid) = self.embed(images, Some(keep))?;
        self.finish(&tokens, 0, grid, None)
    }
}

impl Trainable for Vit {
    fn frozen_tokens(&self, images: &Tensor) -> Result<FrozenTokens, Error> {
        let (tokens, grid) = self.embed(images, None)?;
        let (tokens, _) = through(&self.blocks[..self.frozen_blocks()], &tokens, &[], false)?;
        Ok(FrozenTokens { tokens, grid })
    }

    fn features_from_frozen(&self, prefix: &FrozenTokens) -> Result<Features, Error> {
        self.finish(&prefix.tokens, self.frozen_blocks(), prefix.grid, None)
    }

    fn features_train(
        &self,
        images: &Tensor,
        keep: Option<&TokenSet>,
        rng: &mut Rng,
    ) -> Result<Features, Error> {
        let (tokens, grid) = self.embed(images, keep)?;
        self.finish(&tokens, 0, grid, Some(rng))
    }

    fn parameters(&self) -> Vec<(String, Var)> {
        self.variables.clone()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use defend_nn::normal;

    use super::*;
    use crate::Architecture;

    fn small() -> BackboneSpec {
        BackboneSpec::new(Architecture {
            image_size: 16,
            patch_size: 4,
            width: 24,
            depth: 4,
            heads: 3,
            mlp_width: 32,
            ..Architecture::vit_tiny()
        })
    }

    #[test]
    fn intermediates_are_the_layers_of_the_features() -> Result<(), Error> {
        let vit = Vit::random(small(), 0.0, &mut Rng::seed(4), &Device::Cpu)?.with_layers(4)?;
        let images = normal((3, 3, 16, 16), 1.0, &mut Rng::seed(5), &Device::Cpu)?;
        let (found, features) = (
            vit.intermediates(&images, &[0, 2, 3])?,
            vit.features(&images)?,
        );
        let values = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
        for (layer, (cls, patches)) in found.iter().zip([
            (
                &features.intermediates[2].cls,
                &features.intermediates[2].patches,
            ),
            (
                &features.intermediates[0].cls,
                &features.intermediates[0].patches,
            ),
            (&features.cls, &features.patches),
        ]) {
            assert_eq!(values(&layer.cls)?, values(cls)?);
            assert_eq!(values(&layer.patches)?, values(patches)?);
        }
        for wrong in [&[4][..], &[1, 1], &[2, 0]] {
            assert!(matches!(
                vit.intermediates(&images, wrong),
                Err(Error::Config { .. })
            ));
        }
        Ok(())
    }

    /// Factors are drawn for each block in turn and meet their own block, whichever blocks run together.
    #[test]
    fn stochastic_depth_is_drawn_block_by_block() -> Result<(), Error> {
        let vit = Vit::random(small(), 0.8, &mut Rng::seed(4), &Device::Cpu)?;
        let images = normal((5, 3, 16, 16), 1.0, &mut Rng::seed(5), &Device::Cpu)?;
        let (mut tokens, _) = vit.embed(&images, None)?;
        let rng = &mut Rng::seed(6);
        for block in &vit.blocks {
            let factors = block.factors(5, Some(rng));
            let passed =
                ops::transformer_block(&tokens, &block.parameters, factors.as_ref(), false);
            tokens = passed?.0;
        }
        let expected = vit.layer(&tokens)?.patches;
        let whole = vit.features(&images)?.patches;
        let apart = |a: &Tensor, b: &Tensor| -> Result<f32, Error> {
            Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()?)
        };
        assert!(apart(&expected, &whole)? > 1e-2);
        let mut vit = vit;
        for layers in [1, 2, 4] {
            vit = vit.with_layers(layers)?;
            let found = vit.features_train(&images, None, &mut Rng::seed(6))?;
            assert_eq!(apart(&found.patches, &expected)?, 0.0);
        }
        Ok(())
    }
}
