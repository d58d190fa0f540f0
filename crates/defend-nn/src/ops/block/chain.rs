//! Several blocks one after the other.

use std::borrow::Cow;
use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::super::{from_vec, is_fast, slice, with_slices};
use super::{
    Arithmetic, BlockParameters, Gradients, check, kernel, lock, ticket, transformer_block,
};
use kernel::Saved;

/// Factors of both branches of a block for each image: stochastic depth.
pub type BranchFactors = [Vec<f32>; 2];

/// Runs blocks one after the other as [`transformer_block`] does.
///
/// `x`: `[B, T, D]`; `factors`: each block's, or none at all; returns `[B, T, D]` and, with `with_cls_attention`, the last
/// block's attention of the first token to the others, `[B, h, T - 1]`; no block gives no attention. The values are those of the
/// blocks called one by one.
///
/// Where neither `x` nor any block carries gradients, and without factors, each image of an `f32` CPU batch goes through all blocks
/// by itself, as many images at a time as there are threads, so that threads do not wait for each other after each block. The
/// rest of the batch, and batches of fewer images than threads, are shared by all threads. With gradients the blocks of an
/// `f32` CPU batch are one operation, which spares candle's addition of the gradient between two blocks to zeros.
///
/// # Errors
/// When the shapes do not fit.
pub fn transformer_blocks(
    x: &Tensor,
    blocks: &[&BlockParameters],
    factors: &[Option<BranchFactors>],
    with_cls_attention: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    if !factors.is_empty() && factors.len() != blocks.len() {
        bail!(
            "transformer blocks: factors for {} of {} blocks",
            factors.len(),
            blocks.len()
        )
    }
    let factors_of = |i: usize| factors.get(i).and_then(Option::as_ref);
    let all = || {
        blocks
            .iter()
            .flat_map(|block| block.all_tensors())
            .chain([x])
    };
    if blocks.len() > 1 && all().all(|tensor| is_fast(&[tensor])) {
        let threads = rayon::current_num_threads();
        let images = x.dims().first().copied().unwrap_or(0);
        if all().any(Tensor::track_op) {
            for block in blocks {
                block.check_scales()?;
            }
            let folded = blocks.iter().map(|block| block.folded());
            let folded = folded.collect::<Result<Vec<_>>>()?;
            let calls = folded
                .iter()
                .enumerate()
                .map(|(i, block)| (block, factors_of(i)));
            return fused(x, &calls.collect::<Vec<_>>(), with_cls_attention);
        }
        if threads > 1 && images >= threads && factors.iter().all(Option::is_none) {
            return image_by_image(x, blocks, with_cls_attention, threads);
        }
    }
    let (mut x, mut attention) = (x.clone(), None);
    for (i, block) in blocks.iter().enumerate() {
        let with_attention = with_cls_attention && i + 1 == blocks.len();
        (x, attention) = transformer_block(&x, block, factors_of(i), with_attention)?;
    }
    Ok((x, attention))
}

/// At least one block without LayerScale on `f32` CPU tensors as one operation.
pub(super) fn fused(
    x: &Tensor,
    blocks: &[(&BlockParameters, Option<&BranchFactors>)],
    with_cls_attention: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let (mut calls, mut below, mut tickets) = (Vec::new(), x.track_op(), None);
    for &(parameters, factors) in blocks {
        check(x, parameters, factors)?;
        let tensors = parameters.tensors();
        let tracked = tensors.iter().any(|tensor| tensor.track_op());
        let gradients = Gradients::default();
        tickets = Some(ticket(x, &tensors, &gradients, tickets)?);
        calls.push(Call {
            parameters: parameters.clone(),
            factors: factors.cloned(),
            tracked: [below, tracked],
            saved: Mutex::new(None),
            gradients,
        });
        below |= tracked;
    }
    let (Some(tickets), Some(last)) = (tickets, blocks.last()) else {
        bail!("transformer blocks: there is none")
    };
    let (images, tokens, _) = x.dims3()?;
    let chain = Arc::new(Calls {
        of: calls,
        with_cls_attention,
        cls_attention: Mutex::new(Vec::new()),
    });
    let out = x
        .contiguous()?
        .apply_op2(&tickets, Chain(Arc::clone(&chain)))?;
    if !with_cls_attention {
        return Ok((out, None));
    }
    let attention = std::mem::take(&mut *lock(&chain.cls_attention));
    let attention = from_vec(attention, (images, last.0.heads, tokens - 1))?;
    Ok((out, Some(attention)))
}

/// One call of a block: what its forward and its backward pass share.
struct Call {
    parameters: BlockParameters,
    factors: Option<BranchFactors>,
    /// Whether the input and any parameter need a gradient.
    tracked: [bool; 2],
    /// The input, but of the first block, and the block's activations.
    saved: Mutex<Option<(Vec<f32>, Saved)>>,
    gradients: Gradients,
}

impl Call {
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
        let arithmetic = if save {
            Arithmetic::F32
        } else {
            self.parameters.arithmetic
        };
        let matrices = self.parameters.matrices(arithmetic)?;
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
            Cow::Owned(input) => input,
            Cow::Borrowed(_) => Vec::new(),
        };
        *lock(&self.saved) = saved.map(|saved| (input, saved));
        Ok(out)
    }

    /// The gradient of the block's input from that of its output; those of the parameters are left for [`super::Deliver`]. `x`:
    /// the input of the first block.
    fn backward(&self, x: &[f32], dims: (usize, usize, usize), grad: &[f32]) -> Result<Vec<f32>> {
        let saved = lock(&self.saved);
        let Some((input, saved)) = &*saved else {
            bail!("transformer block: backward pass without a forward pass")
        };
        let x = if input.is_empty() { x } else { input };
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

/// Calls one after the other.
struct Calls {
    of: Vec<Call>,
    with_cls_attention: bool,
    cls_attention: Mutex<Vec<f32>>,
}

/// The operation. One of candle has at most three operands, so the parameters are not among them: their gradients are left in
/// the calls, and [`super::Deliver`]s, which the backward pass reaches next, hand them over.
struct Chain(Arc<Calls>);

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
        let Calls {
            of: calls,
            with_cls_attention,
            cls_attention,
        } = &*self.0;
        let dims = lx.shape().dims3()?;
        let mut values = Cow::Borrowed(slice("transformer blocks", x, lx)?);
        for (i, call) in calls.iter().enumerate() {
            let wanted = *with_cls_attention && i + 1 == calls.len();
            let heads = if wanted { call.parameters.heads } else { 0 };
            let mut attention = vec![0f32; dims.0 * heads * (dims.1 - 1)];
            let out = call.forward(values, dims, wanted.then_some(&mut attention[..]))?;
            values = Cow::Owned(out);
            *lock(cls_attention) = attention;
        }
        Ok((CpuStorage::F32(values.into_owned()), lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        ticket: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let calls = &self.0.of;
        let needs_x = calls.first().is_some_and(|call| call.tracked[0]);
        let needs_parameters = calls.iter().any(|call| call.tracked[1]);
        let dims = x.dims3()?;
        let dx = with_slices("transformer blocks", [x, grad], |[xs, gs]| {
            let mut grad = Cow::Borrowed(gs);
            for call in calls.iter().rev() {
                // Blocks below the first that trains have nothing to pass a gradient to.
                if !call.tracked.contains(&true) {
                    break;
                }
                grad = Cow::Owned(call.backward(xs, dims, &grad)?);
            }
            needs_x
                .then(|| from_vec(grad.into_owned(), x.dims()))
                .transpose()
        })?;
        let ticket = needs_parameters.then(|| ticket.zeros_like()).transpose()?;
        Ok((dx, ticket))
    }
}

fn image_by_image(
    x: &Tensor,
    blocks: &[&BlockParameters],
    with_cls_attention: bool,
    threads: usize,
) -> Result<(Tensor, Option<Tensor>)> {
    for block in blocks {
        block.check_scales()?;
        check(x, block, None)?;
    }
    let (images, tokens, width) = x.dims3()?;
    let heads = blocks.last().map_or(0, |block| block.heads);
    let matrices = blocks.iter().map(|block| block.matrices(block.arithmetic));
    let matrices = matrices.collect::<Result<Vec<_>>>()?;
    // Tokens and attention of some images, on so many threads.
    let run = |images: usize, threads: usize, input: &[f32]| -> Result<(Vec<f32>, Vec<f32>)> {
        let seen = if with_cls_attention { tokens - 1 } else { 0 };
        let mut attention = vec![0f32; images * heads * seen];
        let mut values = Cow::Borrowed(input);
        for (i, (block, matrices)) in blocks.iter().zip(&matrices).enumerate() {
            let shape = block.shape((images, tokens, width), threads);
            let last = i + 1 == blocks.len();
            let attention = (with_cls_attention && last).then_some(&mut attention[..]);
            let forward = |weights: kernel::Weights<'_>| {
                kernel::forward(shape, weights, matrices, &values, attention, false)
            };
            values = Cow::Owned(block.with_weights(forward)?.0);
        }
        Ok((values.into_owned(), attention))
    };
    let alone = images / threads * threads;
    let parts = with_slices("transformer blocks", [x], |[values]| {
        let (first, rest) = values.split_at(alone * tokens * width);
        let first = first.par_chunks_exact(tokens * width).with_max_len(1);
        // A thread that runs out of images takes pieces of another's.
        let parts = first.map(|image| run(1, 1, image));
        let mut parts = parts.collect::<Result<Vec<_>>>()?;
        if alone < images {
            parts.push(run(images - alone, threads, rest)?);
        }
        Ok(parts)
    })?;
    let (values, attention): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
    let values = from_vec(values.concat(), x.dims())?;
    if !with_cls_attention {
        return Ok((values, None));
    }
    let attention = from_vec(attention.concat(), (images, heads, tokens - 1))?;
    Ok((values, Some(attention)))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Var};

    use super::super::super::testing::distance;
    use super::super::tests::{in_pool, parameters, sized};
    use super::*;

    /// Blocks of different weights, the second with LayerScale and other heads, the third in `bf16`.
    fn blocks(images: usize, tokens: usize) -> (Tensor, Vec<BlockParameters>) {
        let t = sized([images, tokens], 96, 64);
        let scaled = |factor: f64| -> Vec<Tensor> {
            let of = |tensor: &Tensor| (tensor * factor).unwrap();
            t.iter().map(of).collect()
        };
        let mut blocks = [0.1, 0.2, 0.15].map(|factor| parameters(&scaled(factor)));
        blocks[1].scales = Some([t[1].clone(), t[2].clone()]);
        blocks[1].heads = 6;
        blocks[2].arithmetic = Arithmetic::Bf16;
        (t[0].clone(), blocks.to_vec())
    }

    fn one_by_one(x: &Tensor, blocks: &[&BlockParameters]) -> Result<(Tensor, Option<Tensor>)> {
        blocks.iter().try_fold((x.clone(), None), |(x, _), block| {
            transformer_block(&x, block, None, true)
        })
    }

    fn on_four_threads<R: Send>(f: impl FnOnce() -> R + Send) -> R {
        in_pool(4, f)
    }

    /// Fewer images than threads, as many, and some that are left.
    #[test]
    fn blocks_in_a_chain_give_the_bits_of_blocks_one_by_one() -> Result<()> {
        for (images, tokens) in [(1, 150), (3, 150), (4, 1), (4, 150), (7, 150), (9, 20)] {
            let (x, blocks) = blocks(images, tokens);
            for chain in [&blocks[..], &blocks[..2]] {
                let chain: Vec<&BlockParameters> = chain.iter().collect();
                // Rows with gaps are copied.
                let gaps = x.transpose(0, 1)?.contiguous()?.transpose(0, 1)?;
                for x in [&x, &gaps] {
                    let (expected, expected_attention) = one_by_one(x, &chain)?;
                    let expected_attention = expected_attention.unwrap();
                    let found = on_four_threads(|| image_by_image(x, &chain, true, 4))?;
                    let chosen = on_four_threads(|| transformer_blocks(x, &chain, &[], true))?;
                    for (found, attention) in [found, chosen] {
                        assert_eq!(distance(&found, &expected), 0.0);
                        let attention = attention.unwrap();
                        assert_eq!(attention.dims(), expected_attention.dims());
                        if tokens > 1 {
                            assert_eq!(distance(&attention, &expected_attention), 0.0);
                        }
                    }
                    let (found, none) = on_four_threads(|| image_by_image(x, &chain, false, 4))?;
                    assert_eq!(distance(&found, &expected), 0.0);
                    assert!(none.is_none());
                }
            }
        }
        Ok(())
    }

    #[test]
    fn no_block_changes_nothing_and_one_that_does_not_fit_is_refused() -> Result<()> {
        let (x, blocks) = blocks(4, 20);
        assert_eq!(
            distance(&transformer_blocks(&x, &[], &[], false)?.0, &x),
            0.0
        );
        let refused = |wrong: &BlockParameters| {
            let chain = [&blocks[0], wrong];
            on_four_threads(|| transformer_blocks(&x, &chain, &[], false)).unwrap_err()
        };
        let mut wrong = blocks[0].clone();
        wrong.fc2[1] = blocks[0].fc1[1].clone();
        let error = refused(&wrong).to_string();
        assert!(error.contains("a parameter has shape [64]"), "{error}");
        wrong = blocks[1].clone();
        wrong.scales = Some([Tensor::ones(1, DType::F32, x.device())?, x.clone()]);
        let error = refused(&wrong).to_string();
        assert!(error.contains("LayerScale has shape [1]"), "{error}");
        Ok(())
    }

    /// To the input, and with a frozen input to a parameter of one block.
    #[test]
    fn gradients_pass_through_a_chain() -> Result<()> {
        let (x, mut blocks) = blocks(4, 20);
        let check = |x: &Tensor, blocks: &[BlockParameters], var: &Var| -> Result<()> {
            let chain: Vec<&BlockParameters> = blocks.iter().collect();
            let gradient = |out: Tensor| -> Result<Tensor> {
                let grads = out.sqr()?.sum_all()?.backward()?;
                Ok(grads.get(var).unwrap().clone())
            };
            let (found, _) = on_four_threads(|| transformer_blocks(x, &chain, &[], false))?;
            let (expected, _) = one_by_one(x, &chain)?;
            let (found, expected) = (gradient(found)?, gradient(expected)?);
            assert!(distance(&found, &found.zeros_like()?) > 0.0);
            assert_eq!(distance(&found, &expected), 0.0);
            Ok(())
        };
        let var = Var::from_tensor(&x)?;
        check(&var, &blocks, &var)?;
        let var = Var::from_tensor(&blocks[1].fc1[0])?;
        blocks[1].fc1[0] = var.as_tensor().clone();
        check(&x, &blocks, &var)
    }
}
