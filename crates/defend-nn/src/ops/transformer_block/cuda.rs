//! The block on a CUDA device.

use candle_core::{DType, Result, Tensor};

use super::super::cuda::{Backward, Precomputed};
use super::parameters::check;
use super::{BlockParameters, BranchFactors};
use crate::gradient_routing::{ParameterGradients, anchored, lock};
use defend_cuda_kernels::block::{Block, Saved, takes_heads};
use defend_cuda_kernels::{aligned, is_aligned, takes};

/// The block by the kernels, where they take its tensors; LayerScale only without a backward pass.
pub(super) fn block(
    x: &Tensor,
    parameters: &BlockParameters,
    factors: Option<&BranchFactors>,
    with_cls_attention: bool,
) -> Result<Option<(Tensor, Option<Tensor>)>> {
    let tensors = parameters.tensors();
    let trains = tensors.iter().any(|p| p.track_op());
    let scales = parameters.scales.as_ref();
    let tracked = x.track_op() || trains;
    let fits = tensors
        .iter()
        .copied()
        .chain(scales.into_iter().flatten())
        .all(|t| t.dtype() == x.dtype() && is_aligned(t) && takes(t));
    let width = parameters.norm1[0].dims();
    let scaled = scales.is_some_and(|scales| {
        let fits = scales.iter().all(|t| t.dims() == width && !t.track_op());
        tracked || !fits
    });
    if !fits || !takes(x) || scaled || !takes_heads(x, parameters.heads)? {
        return Ok(None);
    }
    check(x, parameters, factors)?;
    let factors = factors.map(|[f1, f2]| -> Result<[Tensor; 2]> {
        let put = |f: &[f32]| Tensor::from_slice(f, f.len(), x.device());
        Ok([put(f1)?, put(f2)?])
    });
    let call = Call {
        parameters: parameters.clone(),
        factors: factors.transpose()?,
        tracked: [x.track_op(), trains],
    };
    let x = aligned(x)?;
    let passed = call
        .block()
        .forward(&x.detach(), with_cls_attention, tracked)?;
    let Some(saved) = passed.saved else {
        return Ok(Some((passed.out, passed.cls_attention)));
    };
    let gradients = ParameterGradients::default();
    let anchor = Tensor::zeros(1, DType::F32, x.device())?;
    let anchor = anchored(anchor, &tensors, &gradients)?;
    let pass = BlockGradients {
        call,
        saved,
        gradients,
    };
    let node = Precomputed::new("transformer-block", passed.out, pass);
    Ok(Some((x.apply_op2(&anchor, node)?, passed.cls_attention)))
}

/// What forward and backward pass share.
struct Call {
    parameters: BlockParameters,
    factors: Option<[Tensor; 2]>,
    /// Whether the input and any parameter need a gradient.
    tracked: [bool; 2],
}

impl Call {
    fn block(&self) -> Block<'_> {
        fn pair([a, b]: &[Tensor; 2]) -> [&Tensor; 2] {
            [a, b]
        }
        let p = &self.parameters;
        Block {
            norm1: pair(&p.norm1),
            qkv: pair(&p.qkv),
            projection: pair(&p.projection),
            norm2: pair(&p.norm2),
            fc1: pair(&p.fc1),
            fc2: pair(&p.fc2),
            scales: p.scales.as_ref().map(pair),
            heads: p.heads,
            eps: p.eps,
            factors: self.factors.as_ref(),
        }
    }
}

/// The backward pass: of the input, and of the anchor for the parameters' gradients, which it leaves in `gradients`.
struct BlockGradients {
    call: Call,
    saved: Saved,
    gradients: ParameterGradients,
}

impl Backward<2> for BlockGradients {
    fn backward(
        &self,
        [_, anchor]: [&Tensor; 2],
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 2]> {
        let [needs_x, needs_parameters] = self.call.tracked;
        let block = self.call.block();
        let (dx, gradients) = block.backward(&self.saved, grad, needs_parameters)?;
        if gradients.is_some() {
            *lock(&self.gradients) = gradients;
        }
        let anchor = needs_parameters.then(|| anchor.zeros_like()).transpose()?;
        Ok([needs_x.then_some(dx), anchor])
    }
}
