//! Several blocks one after the other, without a backward pass.

use std::borrow::Cow;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::super::{from_vec, is_fast, with_slices};
use super::{BlockParameters, check, kernel, transformer_block};

/// Runs blocks one after the other as [`transformer_block`] does, without stochastic depth.
///
/// `x`: `[B, T, D]`; returns `[B, T, D]` and, with `with_cls_attention`, the last block's attention of the first token to the
/// others, `[B, h, T - 1]`; no block gives no attention. The values are those of the blocks called one by one.
///
/// Where neither `x` nor any block carries gradients, each image of an `f32` CPU batch goes through all blocks by itself, as many
/// images at a time as there are threads, so that threads do not wait for each other after each block. The rest of the batch, and
/// batches of fewer images than threads, are shared by all threads.
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
    let plain = |tensor: &Tensor| is_fast(&[tensor]) && !tensor.track_op();
    let frozen = |block: &&BlockParameters| block.all_tensors().all(plain);
    let enough = threads > 1 && images >= threads && blocks.len() > 1;
    if enough && plain(x) && blocks.iter().all(frozen) {
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
    use super::super::Arithmetic;
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
                    let chosen = on_four_threads(|| transformer_blocks(x, &chain, true))?;
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
        assert_eq!(distance(&transformer_blocks(&x, &[], false)?.0, &x), 0.0);
        let refused = |wrong: &BlockParameters| {
            let chain = [&blocks[0], wrong];
            on_four_threads(|| transformer_blocks(&x, &chain, false)).unwrap_err()
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
            let (found, _) = on_four_threads(|| transformer_blocks(x, &chain, false))?;
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
