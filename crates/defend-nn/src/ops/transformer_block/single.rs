//! One block: by its fused operation, or composed of others.

use candle_core::{Result, Tensor};

use super::super::{attention, cls_attention, is_fast, layer_norm, linear, linear_gelu};
#[cfg(feature = "cuda")]
use super::cuda;
use super::fused::fused;
use super::{BlockParameters, BranchFactors};

/// Attention and MLP, each behind a LayerNorm and around a residual connection:
/// `y = x + f1 attention(norm1(x))`, `y + f2 mlp(norm2(y))`.
///
/// `x`: `[B, T, D]`; `factors`: f1 and f2 of each image (stochastic depth), ones without; returns `[B, T, D]` and, with
/// `with_cls_attention`, the attention of the first token to the others, `[B, h, T - 1]`, which carries no gradient.
/// Differentiable with respect to `x` and every parameter. On `f32` CPU tensors one kernel runs the block piece by piece
/// of each image, so that intermediate values stay in the cache; on CUDA kernels of our own run between cuBLAS's products.
/// In half precision LayerScale with a backward pass, and other devices, compose the operations of this module.
///
/// # Errors
/// When the shapes do not fit.
pub fn transformer_block(
    x: &Tensor,
    parameters: &BlockParameters,
    factors: Option<&BranchFactors>,
    with_cls_attention: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    parameters.check_scales()?;
    #[cfg(feature = "cuda")]
    {
        let tracked = x.track_op() || parameters.track_op();
        let single = x.dtype() == candle_core::DType::F32 && x.device().is_cuda();
        if parameters.scales.is_some() && tracked && single {
            return transformer_block(x, &parameters.folded()?, factors, with_cls_attention);
        }
        if let Some(found) = cuda::block(x, parameters, factors, with_cls_attention)? {
            return Ok(found);
        }
    }
    if !parameters.is_fast() || !is_fast(&[x]) {
        return composed(x, parameters, factors, with_cls_attention);
    }
    fused(x, &[(parameters, factors)], with_cls_attention)
}

/// The same from the other operations.
pub(super) fn composed(
    x: &Tensor,
    parameters: &BlockParameters,
    factors: Option<&BranchFactors>,
    with_cls_attention: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let norm = |x: &Tensor, [w, b]: &[Tensor; 2]| layer_norm(x, w, b, parameters.eps);
    let map = |x: &Tensor, [w, b]: &[Tensor; 2]| linear(x, w, b);
    let scaled = |branch: Tensor, which: usize| -> Result<Tensor> {
        let branch = match &parameters.scales {
            Some(scales) => branch.broadcast_mul(&scales[which])?,
            None => branch,
        };
        let Some(factors) = factors else {
            return Ok(branch);
        };
        let images = factors[which].len();
        let factors = Tensor::from_slice(&factors[which], (images, 1, 1), branch.device())?;
        branch.broadcast_mul(&factors.to_dtype(branch.dtype())?)
    };
    let qkv = map(&norm(x, &parameters.norm1)?, &parameters.qkv)?;
    let cls = with_cls_attention
        .then(|| cls_attention(&qkv.detach(), parameters.heads))
        .transpose()?;
    let branch = map(&attention(&qkv, parameters.heads)?, &parameters.projection)?;
    let x = (x + scaled(branch, 0)?)?;
    let [w, b] = &parameters.fc1;
    let hidden = linear_gelu(&norm(&x, &parameters.norm2)?, w, b)?;
    let branch = map(&hidden, &parameters.fc2)?;
    Ok(((&x + scaled(branch, 1)?)?, cls))
}
