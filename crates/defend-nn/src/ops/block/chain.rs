//! Several blocks one after the other, without a backward pass.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::super::{from_vec, is_fast, with_slices};
use super::{BlockParameters, check, kernel, transformer_block};

/// Runs blocks one after the other as [`transformer_block`] does, without stochastic depth.
///
/// `x`: `[B, T, D]`; returns `[B, T, D]` and, with `with_cls_attention`, the last block's attention of the first token to the
/// others, `[B, h, T - 1]`. The values are those of the blocks called one by one. Without gradients, on the CPU, each image goes
/// through all blocks on a thread of its own, so that no thread waits for the others after each of them; what is left of the
/// batch, fewer images than there are threads, is shared by all.
///
/// # Errors
/// When the shapes do not fit.
pub fn transformer_blocks(
    x: &Tensor,
    blocks: &[&BlockParameters],
    with_cls_attention: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let threads = rayon::current_num_threads();
    let images = x.dims().first().copied().unwrap_or(0);
    let fast = |block: &&BlockParameters| {
        let mut tensors = block.tensors().into_iter().chain(block.scales());
        tensors.all(|tensor| is_fast(&[tensor]) && !tensor.track_op())
    };
    let alone = threads > 1 && images >= threads && is_fast(&[x]) && !x.track_op();
    if alone && blocks.len() > 1 && blocks.iter().all(fast) {
        return image_by_image(x, blocks, with_cls_attention, threads);
    }
    let (mut x, mut attention) = (x.clone(), None);
    for (i, block) in blocks.iter().enumerate() {
        let with_attention = with_cls_attention && i + 1 == blocks.len();
        (x, attention) = transformer_block(&x, block, None, with_attention)?;
    }
    Ok((x, attention))
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
    // The values and the attention of some images, on so many threads.
    let run = |images: usize, threads: usize, x: &[f32]| -> Result<(Vec<f32>, Vec<f32>)> {
        let seen = if with_cls_attention { tokens - 1 } else { 0 };
        let mut attention = vec![0f32; images * heads * seen];
        let mut values: Option<Vec<f32>> = None;
        for (i, (block, matrices)) in blocks.iter().zip(&matrices).enumerate() {
            let shape = block.shape((images, tokens, width), threads);
            let x = values.as_deref().unwrap_or(x);
            let last = i + 1 == blocks.len();
            let attention = (with_cls_attention && last).then_some(&mut attention[..]);
            let forward = |weights: kernel::Weights<'_>| {
                kernel::forward(shape, weights, matrices, x, attention, false)
            };
            values = Some(block.with_weights(forward)?.0);
        }
        Ok((values.unwrap_or_else(|| x.to_vec()), attention))
    };
    let alone = images / threads * threads;
    let parts = with_slices("transformer blocks", [x], |[x]| {
        let (each, rest) = x.split_at(alone * tokens * width);
        let each = each.par_chunks_exact(tokens * width).with_max_len(1);
        let mut parts = each.map(|x| run(1, 1, x)).collect::<Result<Vec<_>>>()?;
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
    use candle_core::DType;

    use super::super::super::testing::distance;
    use super::super::Arithmetic;
    use super::super::tests::{parameters, sized};
    use super::*;

    /// Blocks of different weights, the second with LayerScale, the third in `bf16`.
    fn blocks(images: usize) -> (Tensor, Vec<BlockParameters>) {
        let t = sized([images, 150], 96, 64);
        let scaled = |factor: f64| -> Vec<Tensor> {
            let of = |tensor: &Tensor| (tensor * factor).unwrap();
            t.iter().map(of).collect()
        };
        let mut blocks = [0.1, 0.2, 0.15].map(|factor| parameters(&scaled(factor)));
        blocks[1].scales = Some([t[1].clone(), t[2].clone()]);
        blocks[2].arithmetic = Arithmetic::Bf16;
        (t[0].clone(), blocks.to_vec())
    }

    /// Fewer images than threads, as many, and some that are left.
    #[test]
    fn blocks_in_a_chain_give_the_bits_of_blocks_one_by_one() -> Result<()> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build();
        let pool = pool.unwrap();
        for images in [1, 3, 4, 7, 9] {
            let (x, blocks) = blocks(images);
            let chain: Vec<&BlockParameters> = blocks.iter().collect();
            let (mut expected, mut expected_attention) = (x.clone(), None);
            for block in &blocks {
                (expected, expected_attention) = transformer_block(&expected, block, None, true)?;
            }
            let run = |attention| pool.install(|| transformer_blocks(&x, &chain, attention));
            let (found, attention) = run(true)?;
            assert_eq!(distance(&found, &expected), 0.0);
            assert_eq!(
                distance(&attention.unwrap(), &expected_attention.unwrap()),
                0.0
            );
            let (found, attention) = run(false)?;
            assert_eq!(distance(&found, &expected), 0.0);
            assert!(attention.is_none());
        }
        Ok(())
    }

    #[test]
    fn no_block_changes_nothing_and_one_that_does_not_fit_is_refused() -> Result<()> {
        let (x, blocks) = blocks(64);
        assert_eq!(distance(&transformer_blocks(&x, &[], false)?.0, &x), 0.0);
        let mut wrong = blocks[0].clone();
        wrong.fc2[1] = blocks[0].fc1[1].clone();
        assert!(transformer_blocks(&x, &[&blocks[0], &wrong], false).is_err());
        wrong = blocks[1].clone();
        wrong.scales = Some([Tensor::ones(1, DType::F32, x.device())?, x.clone()]);
        assert!(transformer_blocks(&x, &[&blocks[0], &wrong], false).is_err());
        Ok(())
    }

    #[test]
    fn gradients_pass_through_a_chain() -> Result<()> {
        let (x, blocks) = blocks(8);
        let x = candle_core::Var::from_tensor(&x)?;
        let chain: Vec<&BlockParameters> = blocks[..2].iter().collect();
        let gradient = |out: Tensor| -> Result<Tensor> {
            let grads = out.sqr()?.sum_all()?.backward()?;
            Ok(grads.get(&x).unwrap().clone())
        };
        let one_by_one = transformer_block(&x, &blocks[0], None, false)?.0;
        let one_by_one = transformer_block(&one_by_one, &blocks[1], None, false)?.0;
        let found = gradient(transformer_blocks(&x, &chain, false)?.0)?;
        assert_eq!(distance(&found, &gradient(one_by_one)?), 0.0);
        Ok(())
    }
}
