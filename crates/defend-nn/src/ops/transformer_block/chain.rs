//! Several blocks one after the other.

use std::borrow::Cow;

use candle_core::{Result, Tensor, bail};
use defend_kernels::transformer_block as kernel;
use rayon::prelude::*;

use super::super::{from_vec, is_fast, with_slices};
use super::fused::fused;
use super::parameters::check;
use super::single::transformer_block;
use super::{BlockParameters, BranchFactors};

/// Runs blocks one after the other as [`transformer_block`] does.
///
/// `x`: `[B, T, D]`; `factors`: each block's, or none at all; returns `[B, T, D]` and, with `with_cls_attention`, the last
/// block's attention of the first token to the others, `[B, h, T - 1]`; no block gives no attention. The values are those of the
/// blocks called one by one.
///
/// Where neither `x` nor any block carries gradients, and without factors, each image of an `f32` CPU batch goes through all blocks
/// by itself, as many images at a time as there are threads, so that threads do not wait for each other after each block. The
/// rest of the batch, and batches of fewer images than threads, are shared by all threads. On `f32` CPU tensors the blocks from the
/// first on that carries gradients are one operation, which spares candle's addition of the gradient between two blocks to zeros.
///
/// # Errors
/// When the shapes do not fit, and for factors of another number of blocks.
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
    if blocks.len() > 1 && is_fast(&[x]) && blocks.iter().all(|block| block.is_fast()) {
        let frozen = blocks.iter().take_while(|block| !block.track_op());
        let frozen = if x.track_op() { 0 } else { frozen.count() };
        if frozen == 0 {
            let with_factors = blocks.iter().enumerate();
            let with_factors = with_factors.map(|(i, block)| (*block, factors_of(i)));
            return fused(x, &with_factors.collect::<Vec<_>>(), with_cls_attention);
        }
        if frozen < blocks.len() {
            let (below, above) = factors.split_at(frozen.min(factors.len()));
            let (x, _) = transformer_blocks(x, &blocks[..frozen], below, false)?;
            return transformer_blocks(&x, &blocks[frozen..], above, with_cls_attention);
        }
        let threads = rayon::current_num_threads();
        let enough = threads > 1 && x.dim(0)? >= threads;
        if enough && factors.iter().all(Option::is_none) {
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
    let matrices = blocks
        .iter()
        .map(|block| block.matrices(block.compute_precision));
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
    use std::sync::Arc;

    use candle_core::{DType, Var};

    use super::super::super::testing::distance;
    use super::super::ComputePrecision;
    use super::super::tests::{in_pool, parameters, sized};
    use super::*;

    /// Blocks of different weights, the second with LayerScale and other heads, the third in `bf16`.
    fn blocks(images: usize, tokens: usize) -> (Tensor, [BlockParameters; 3]) {
        let t = sized([images, tokens], 96, 64);
        let scaled = |factor: f64| -> Vec<Tensor> {
            let of = |tensor: &Tensor| (tensor * factor).unwrap();
            t.iter().map(of).collect()
        };
        let mut blocks = [0.1, 0.2, 0.15].map(|factor| parameters(&scaled(factor)));
        blocks[1].scales = Some([t[1].clone(), t[2].clone()]);
        blocks[1].heads = 6;
        blocks[2].compute_precision = ComputePrecision::Bf16;
        (t[0].clone(), blocks)
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

    /// Everything that a training step asks for, once from the chain and once block by block: values, attention, gradients of
    /// the variables.
    fn trained(
        x: &Tensor,
        blocks: &[&BlockParameters],
        factors: &[Option<BranchFactors>],
        variables: &[Var],
    ) -> Result<[Vec<Tensor>; 2]> {
        let results = |(out, attention): (Tensor, Option<Tensor>)| -> Result<Vec<Tensor>> {
            let grads = out.sqr()?.sum_all()?.backward()?;
            let gradients = variables.iter().map(|var| grads.get(var).unwrap().clone());
            Ok([out, attention.unwrap()]
                .into_iter()
                .chain(gradients)
                .collect())
        };
        let found = on_four_threads(|| transformer_blocks(x, blocks, factors, true))?;
        let mut in_turn = blocks.iter().enumerate();
        let expected = in_turn.try_fold((x.clone(), None), |(x, _), (i, block)| {
            let factors = factors.get(i).and_then(Option::as_ref);
            transformer_block(&x, block, factors, true)
        })?;
        Ok([results(found)?, results(expected)?])
    }

    /// Makes variables of a block's parameters, LayerScale's among them.
    fn train(block: &mut BlockParameters) -> Result<Vec<Var>> {
        let mut variables = Vec::new();
        let tensors = [
            &mut block.norm1,
            &mut block.qkv,
            &mut block.projection,
            &mut block.norm2,
            &mut block.fc1,
            &mut block.fc2,
        ];
        for tensor in tensors.into_iter().chain(&mut block.scales).flatten() {
            let var = Var::from_tensor(tensor)?;
            *tensor = var.as_tensor().clone();
            variables.push(var);
        }
        Ok(variables)
    }

    fn same(found: &[Tensor], expected: &[Tensor], tolerance: f64) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert_eq!(found.dims(), expected.dims());
            let size = expected.abs().unwrap().flatten_all().unwrap();
            if size.elem_count() > 0 {
                let size = f64::from(size.max(0).unwrap().to_scalar::<f32>().unwrap());
                assert!(size > 0.0 && distance(found, expected) <= tolerance * size);
            }
        }
    }

    #[test]
    fn gradients_pass_through_a_chain() -> Result<()> {
        // Fewer images than threads and more; two tokens have one attention, which is 1.
        for (images, tokens) in [(1, 20), (5, 20), (3, 2)] {
            let (x, frozen) = blocks(images, tokens);
            let with = |factor: f32| -> Option<BranchFactors> {
                let of = |i: usize| if i == 1 { 0.0 } else { factor };
                let [first, second] = [0, 3].map(|from| (from..from + images).map(of).collect());
                Some([first, second])
            };
            for factors in [vec![], vec![with(1.25), None, with(2.0)]] {
                // All blocks and the input.
                let mut blocks = frozen.clone();
                let mut variables = vec![Var::from_tensor(&x)?];
                for block in &mut blocks {
                    variables.extend(train(block)?);
                }
                let input = variables[0].as_tensor().clone();
                let [found, expected] = trained(&input, &blocks.each_ref(), &factors, &variables)?;
                same(&found, &expected, 0.0);
                // The last block alone, above blocks that keep to their own arithmetic.
                for trains in 1..3 {
                    let mut blocks = frozen.clone();
                    blocks.swap(0, 2);
                    let variables = train(&mut blocks[trains])?;
                    let [found, expected] = trained(&x, &blocks.each_ref(), &factors, &variables)?;
                    same(&found, &expected, 0.0);
                }
            }
        }
        Ok(())
    }

    /// Its gradient is the sum of two, which candle adds in another order than [`crate::backward`].
    #[test]
    fn a_block_may_come_twice() -> Result<()> {
        let (x, [mut block, ..]) = blocks(4, 20);
        let variables = train(&mut block)?;
        let [found, expected] = trained(&x, &[&block, &block], &[], &variables)?;
        same(&found, &expected, 1e-5);
        let loss = transformer_blocks(&x, &[&block, &block], &[], false)?
            .0
            .sqr()?
            .sum_all()?;
        let grads = crate::backward(&loss)?;
        let direct: Vec<Tensor> = variables
            .iter()
            .map(|var| grads.get(var).unwrap().clone())
            .collect();
        same(&direct, &found[2..], 1e-5);
        Ok(())
    }

    #[test]
    fn frozen_blocks_with_layer_scale_keep_their_matrices_below_one_that_trains() -> Result<()> {
        let (x, mut blocks) = blocks(4, 20);
        let kept = blocks[1].matrices(ComputePrecision::F32)?;
        train(&mut blocks[2])?;
        transformer_blocks(&x, &blocks.each_ref(), &[], false)?;
        assert!(Arc::ptr_eq(
            &kept,
            &blocks[1].matrices(ComputePrecision::F32)?
        ));
        Ok(())
    }

    #[test]
    fn factors_are_for_every_block_or_none() {
        let (x, blocks) = blocks(2, 5);
        let error = transformer_blocks(&x, &blocks.each_ref(), &[None, None], false);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("factors for 2 of 3 blocks"), "{error}");
    }
}
