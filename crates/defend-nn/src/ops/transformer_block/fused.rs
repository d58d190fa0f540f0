//! Blocks on `f32` CPU tensors as one operation.

use std::borrow::Cow;
use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
use defend_kernels::transformer_block::{self as kernel, Saved};

use super::super::{from_vec, slice, with_slices};
use super::parameters::check;
use super::{BlockParameters, BranchFactors, ComputePrecision};
use crate::gradient_routing::{ParameterGradients, anchored, lock};

/// At least one block on `f32` CPU tensors as one operation.
pub(super) fn fused(
    x: &Tensor,
    blocks: &[(&BlockParameters, Option<&BranchFactors>)],
    with_cls_attention: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let Some((last, _)) = blocks.last() else {
        bail!("transformer blocks: there is none")
    };
    let mut anchor = Tensor::zeros(1, DType::F32, x.device())?;
    let mut calls = Vec::new();
    // Whether what comes into a block carries gradients.
    let mut tracked = x.track_op();
    for &(parameters, factors) in blocks {
        parameters.check_scales()?;
        // The kernel's backward pass knows no LayerScale; without one the matrices that are kept have it in them.
        let parameters = if tracked || parameters.track_op() {
            parameters.folded()?
        } else {
            parameters.clone()
        };
        check(x, &parameters, factors)?;
        let trains = parameters.track_op();
        let gradients = ParameterGradients::default();
        anchor = anchored(anchor, &parameters.tensors(), &gradients)?;
        calls.push(BlockCall {
            parameters,
            factors: factors.cloned(),
            tracked: [tracked, trains],
            saved: Mutex::new(None),
            gradients,
        });
        tracked |= trains;
    }
    let (images, tokens, _) = x.dims3()?;
    let chain = Arc::new(ChainCall {
        blocks: calls,
        with_cls_attention,
        cls_attention: Mutex::new(Vec::new()),
    });
    let out = x
        .contiguous()?
        .apply_op2(&anchor, Chain(Arc::clone(&chain)))?;
    if !with_cls_attention {
        return Ok((out, None));
    }
    let attention = std::mem::take(&mut *lock(&chain.cls_attention));
    let attention = from_vec(attention, (images, last.heads, tokens - 1))?;
    Ok((out, Some(attention)))
}

/// One call of a block: what its forward and its backward pass share.
struct BlockCall {
    parameters: BlockParameters,
    factors: Option<BranchFactors>,
    /// Whether the input and any parameter need a gradient.
    tracked: [bool; 2],
    /// The input, if it is not the chain's, and the block's activations.
    saved: Mutex<Option<(Option<Vec<f32>>, Saved)>>,
    gradients: ParameterGradients,
}

impl BlockCall {
    fn shape(&self, x: (usize, usize, usize)) -> kernel::Shape<'_> {
        let factors = self.factors.as_ref();
        kernel::Shape {
            factors: factors.map(|[f1, f2]| [&f1[..], &f2[..]]),
            ..self.parameters.shape(x, rayon::current_num_threads())
        }
    }

    /// The block's output; what the backward pass needs is kept.
    fn forward(
        &self,
        x: Cow<'_, [f32]>,
        dims: (usize, usize, usize),
        cls_attention: Option<&mut [f32]>,
    ) -> Result<Vec<f32>> {
        let save = self.tracked.contains(&true);
        // The backward pass is that of `f32`.
        let compute_precision = if save {
            ComputePrecision::F32
        } else {
            self.parameters.compute_precision
        };
        let matrices = self.parameters.matrices(compute_precision)?;
        let (out, saved) = self.parameters.with_weights(|weights| {
            kernel::forward(
                self.shape(dims),
                weights,
                &matrices,
                &x,
                cls_attention,
                save,
            )
        })?;
        let input = match x {
            Cow::Owned(input) => Some(input),
            Cow::Borrowed(_) => None,
        };
        *lock(&self.saved) = saved.map(|saved| (input, saved));
        Ok(out)
    }

    /// The gradient of the block's input from that of its output; those of the parameters are left for gradient anchors. `x`:
    /// the chain's input.
    fn backward(&self, x: &[f32], dims: (usize, usize, usize), grad: &[f32]) -> Result<Vec<f32>> {
        let saved = lock(&self.saved);
        let Some((input, saved)) = &*saved else {
            bail!("transformer block: backward pass without a forward pass")
        };
        let x = input.as_deref().unwrap_or(x);
        let [_, with_parameters] = self.tracked;
        let (dx, gradients) = self.parameters.with_weights(|weights| {
            kernel::backward(self.shape(dims), weights, x, saved, grad, with_parameters)
        })?;
        if let Some(gradients) = gradients {
            let pairs = gradients.into_iter().zip(self.parameters.tensors());
            let gradients = pairs.map(|(values, like)| from_vec(values, like.dims()));
            *lock(&self.gradients) = Some(gradients.collect::<Result<_>>()?);
        }
        Ok(dx)
    }
}

/// One call of a chain.
struct ChainCall {
    blocks: Vec<BlockCall>,
    with_cls_attention: bool,
    cls_attention: Mutex<Vec<f32>>,
}

/// The operation. One of candle has at most three operands, so the parameters are not among them: their gradients are left in
/// the calls, and gradient anchors, which the backward pass reaches next, hand them over.
struct Chain(Arc<ChainCall>);

impl CustomOp2 for Chain {
    fn name(&self) -> &'static str {
        "transformer-blocks"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ChainCall {
            blocks,
            with_cls_attention,
            cls_attention,
        } = &*self.0;
        let dims = lx.shape().dims3()?;
        let mut values = Cow::Borrowed(slice("transformer blocks", x, lx)?);
        for (i, block) in blocks.iter().enumerate() {
            let wanted = *with_cls_attention && i + 1 == blocks.len();
            let heads = if wanted { block.parameters.heads } else { 0 };
            let mut attention = vec![0f32; dims.0 * heads * (dims.1 - 1)];
            let out = block.forward(values, dims, wanted.then_some(&mut attention[..]))?;
            values = Cow::Owned(out);
            *lock(cls_attention) = attention;
        }
        Ok((CpuStorage::F32(values.into_owned()), lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        anchor: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let blocks = &self.0.blocks;
        let needs_x = blocks.first().is_some_and(|block| block.tracked[0]);
        let needs_parameters = blocks.iter().any(|block| block.tracked[1]);
        let dims = x.dims3()?;
        let dx = with_slices("transformer blocks", [x, grad], |[xs, gs]| {
            let mut grad = Cow::Borrowed(gs);
            for block in blocks.iter().rev() {
                grad = Cow::Owned(block.backward(xs, dims, &grad)?);
            }
            let dx = needs_x.then(|| from_vec(grad.into_owned(), x.dims()));
            dx.transpose()
        })?;
        let anchor = needs_parameters.then(|| anchor.zeros_like()).transpose()?;
        Ok((dx, anchor))
    }
}
