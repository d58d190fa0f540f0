//! Against finite differences, the composition, and itself on other threads and batches.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};

use super::super::testing::{check_gradients, distance, noise};
use super::super::{attention, layer_norm, linear};
use super::parameters::shapes;
use super::single::composed;
use super::*;

/// Input and the twelve parameters for width 12, hidden 20.
fn inputs(images: usize, tokens: usize) -> Vec<Tensor> {
    sized([images, tokens], 12, 20)
}

pub(super) fn sized([images, tokens]: [usize; 2], d: usize, hidden: usize) -> Vec<Tensor> {
    let input = vec![images, tokens, d];
    let tensors = std::iter::once(input).chain(shapes(d, hidden)).zip(0..);
    tensors.map(|(shape, seed)| noise(&shape, seed)).collect()
}

pub(super) fn parameters(t: &[Tensor]) -> BlockParameters {
    let pair = |i: usize| [t[i].clone(), t[i + 1].clone()];
    BlockParameters {
        norm1: pair(1),
        qkv: pair(3),
        projection: pair(5),
        norm2: pair(7),
        fc1: pair(9),
        fc2: pair(11),
        scales: None,
        heads: 3,
        eps: 1e-6,
        compute_precision: ComputePrecision::F32,
        prepared: Prepared::default(),
    }
}

fn run(t: &[Tensor], factors: Option<&BranchFactors>) -> Result<Tensor> {
    Ok(transformer_block(&t[0], &parameters(t), factors, false)?.0)
}

#[test]
fn gradients_match_finite_differences() {
    check_gradients(&inputs(2, 5), |t| run(t, None));
    let factors = [vec![1.25, 0.0, 0.5], vec![0.0, 2.0, 1.0]];
    check_gradients(&inputs(3, 4), |t| run(t, Some(&factors)));
}

/// Heads that fill the kernel's blocks, as real ones do, in images of one piece and of several.
#[test]
fn whole_blocks_of_columns_match_the_composition_in_double_precision() -> Result<()> {
    whole_blocks([2, 70], 64)?;
    whole_blocks([2, 150], 64)?;
    whole_blocks([2, 1], 64)?;
    // Hidden channels in several parts, of which the last ends within a block.
    whole_blocks([2, 70], 900)
}

fn whole_blocks(extents: [usize; 2], hidden: usize) -> Result<()> {
    let mut t = sized(extents, 96, hidden);
    // No sum is large.
    for matrix in [3, 5, 9, 11] {
        t[matrix] = (&t[matrix] / 10.0)?;
    }
    let gradients = |dtype: DType| -> Result<(Tensor, Vec<Tensor>)> {
        let vars = t
            .iter()
            .map(|t| candle_core::Var::from_tensor(&t.to_dtype(dtype)?))
            .collect::<Result<Vec<_>>>()?;
        let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let out = run(&tensors, None)?;
        let grads = (&out * noise(out.dims(), 99).to_dtype(dtype)?)?
            .sum_all()?
            .backward()?;
        let of = |var: &candle_core::Var| grads.get(var).unwrap().clone();
        Ok((out, vars.iter().map(of).collect()))
    };
    let (expected, expected_gradients) = gradients(DType::F64)?;
    let (found, found_gradients) = gradients(DType::F32)?;
    assert!(distance(&found, &expected) < 1e-5);
    for (i, (found, expected)) in found_gradients.iter().zip(&expected_gradients).enumerate() {
        let (off, scale) = (
            distance(found, expected),
            distance(expected, &expected.zeros_like()?),
        );
        assert!(
            off < 1e-5 * scale.max(1.0),
            "gradient {i}: {off} of {scale}"
        );
    }
    Ok(())
}

#[test]
fn the_kernel_equals_the_composition() -> Result<()> {
    // More tokens than a piece holds.
    let t = inputs(2, 150);
    let factors = [vec![1.0, 0.0], vec![0.5, 1.5]];
    for factors in [None, Some(&factors)] {
        let (out, attention) = transformer_block(&t[0], &parameters(&t), factors, true)?;
        let (expected, expected_attention) = composed(&t[0], &parameters(&t), factors, true)?;
        assert!(distance(&out, &expected) < 1e-5);
        let (found, expected) = (attention.unwrap(), expected_attention.unwrap());
        assert!(distance(&found, &expected) < 1e-6);
    }
    Ok(())
}

/// Input, the twelve parameters, and LayerScale's two.
fn scaled_inputs(images: usize, tokens: usize) -> Vec<Tensor> {
    let mut t = inputs(images, tokens);
    t.extend([noise(&[12], 50), noise(&[12], 51)]);
    t
}

fn scaled_parameters(t: &[Tensor]) -> BlockParameters {
    BlockParameters {
        scales: Some([t[13].clone(), t[14].clone()]),
        ..parameters(t)
    }
}

#[test]
fn layer_scale_has_gradients_and_is_kept_where_it_is_frozen() -> Result<()> {
    let factors = [vec![1.25, 0.0, 0.5], vec![0.0, 2.0, 1.0]];
    check_gradients(&scaled_inputs(3, 4), |t| {
        Ok(transformer_block(&t[0], &scaled_parameters(t), Some(&factors), false)?.0)
    });
    let t = scaled_inputs(2, 150);
    let mut p = scaled_parameters(&t);
    let (expected, expected_attention) = composed(&t[0], &p, None, true)?;
    let (found, attention) = transformer_block(&t[0], &p, None, true)?;
    assert!(distance(&found, &expected) < 1e-5);
    let [found, expected] = [attention, expected_attention].map(Option::unwrap);
    assert!(distance(&found, &expected) < 1e-6);
    let [first, second] = [(); 2].map(|()| p.matrices(ComputePrecision::F32));
    assert!(Arc::ptr_eq(&first?, &second?));
    // A gradient for the input alone.
    let x = candle_core::Var::from_tensor(&t[0])?;
    let gradient = |out: Tensor| -> Result<Tensor> {
        let grads = (out * noise(t[0].dims(), 99))?.sum_all()?.backward()?;
        Ok(grads.get(&x).unwrap().clone())
    };
    let found = gradient(transformer_block(&x, &p, None, false)?.0)?;
    let expected = gradient(composed(&x, &p, None, false)?.0)?;
    assert!(distance(&found, &expected) < 1e-4);
    // Other factors and another bias are never taken for the kept ones.
    for change in 0..2 {
        match change {
            0 => p.scales = Some([t[14].clone(), t[13].clone()]),
            _ => p.fc2[1] = (&t[12] * 2.0)?.detach(),
        }
        let expected = composed(&t[0], &p, None, false)?.0;
        let found = transformer_block(&t[0], &p, None, false)?.0;
        assert!(distance(&found, &expected) < 1e-5);
    }
    p.scales = Some([noise(&[1], 0), noise(&[12], 1)]);
    assert!(transformer_block(&t[0], &p, None, false).is_err());
    Ok(())
}

#[test]
fn products_in_bf16_round_matrices_and_activations() -> Result<()> {
    for hidden in [64, 404, 800] {
        rounded_products(hidden)?;
    }
    Ok(())
}

fn rounded_products(hidden: usize) -> Result<()> {
    let mut t = sized([2, 150], 96, hidden);
    for matrix in [3, 5, 9, 11] {
        t[matrix] = (&t[matrix] / 10.0)?;
    }
    let mut p = parameters(&t);
    let single = transformer_block(&t[0], &p, None, false)?.0;
    p.compute_precision = ComputePrecision::Bf16;
    p.prepared = Prepared::default();
    let found = transformer_block(&t[0], &p, None, false)?.0;
    // Step by step in double precision.
    let wide: Vec<Tensor> = t
        .iter()
        .map(|t| t.to_dtype(DType::F64))
        .collect::<Result<_>>()?;
    let w = parameters(&wide);
    let round = |t: &Tensor| t.to_dtype(DType::BF16)?.to_dtype(DType::F64);
    let norm = |x: &Tensor, [w, b]: &[Tensor; 2]| layer_norm(x, w, b, p.eps);
    let map = |x: &Tensor, [w, b]: &[Tensor; 2]| linear(&round(x)?, &round(w)?, b);
    let attended = attention(&map(&norm(&wide[0], &w.norm1)?, &w.qkv)?, p.heads)?;
    let middle = (&wide[0] + map(&attended, &w.projection)?)?;
    let hidden = super::super::gelu(&map(&norm(&middle, &w.norm2)?, &w.fc1)?)?;
    let expected = (&middle + map(&hidden, &w.fc2)?)?;
    let mean = |a: &Tensor, b: &Tensor| -> Result<f64> {
        (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?
            .abs()?
            .mean_all()?
            .to_scalar()
    };
    // Values halfway between two of bf16 may go either way.
    let (off, rounding) = (mean(&found, &expected)?, mean(&single, &expected)?);
    assert!(off < 0.05 * rounding, "{off} of {rounding}");
    // LayerScale is multiplied into the matrices before they are rounded.
    let scales = [40, 41].map(|seed| (noise(&[96], seed) * 0.5).unwrap());
    let mut scaled = p.clone();
    scaled.scales = Some(scales);
    scaled.prepared = Prepared::default();
    let mut folded = scaled.folded()?;
    folded.compute_precision = ComputePrecision::Bf16;
    let [a, b] = [&scaled, &folded].map(|p| transformer_block(&t[0], p, None, false));
    assert_eq!(distance(&a?.0, &b?.0), 0.0);
    // An image does not depend on its batch.
    let second = t[0].narrow(0, 1, 1)?;
    let alone = transformer_block(&second, &p, None, false)?.0;
    assert_eq!(distance(&alone, &found.narrow(0, 1, 1)?), 0.0);
    // What has a backward pass is computed in f32.
    let x = candle_core::Var::from_tensor(&t[0])?;
    let tracked = transformer_block(&x, &p, None, false)?.0;
    assert_eq!(distance(&tracked, &single), 0.0);
    Ok(())
}

#[test]
fn an_image_does_not_depend_on_its_batch() -> Result<()> {
    let mut t = inputs(5, 150);
    let whole = run(&t, None)?;
    t[0] = t[0].narrow(0, 3, 1)?;
    assert_eq!(distance(&run(&t, None)?, &whole.narrow(0, 3, 1)?), 0.0);
    Ok(())
}

/// All values of a block on so many threads: output, attention, output in `bf16`, and every gradient.
fn on_threads(t: &[Tensor], threads: usize) -> Result<Vec<Tensor>> {
    let compute = || {
        let mut p = parameters(t);
        let (out, attention) = transformer_block(&t[0], &p, None, true)?;
        p.compute_precision = ComputePrecision::Bf16;
        p.prepared = Prepared::default();
        let rounded = transformer_block(&t[0], &p, None, false)?.0;
        let mut found = vec![out, attention.unwrap(), rounded];
        let vars = t.iter().map(candle_core::Var::from_tensor);
        let vars = vars.collect::<Result<Vec<_>>>()?;
        let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let grads = run(&tracked, None)?.sqr()?.sum_all()?.backward()?;
        found.extend(vars.iter().map(|var| grads.get(var).unwrap().clone()));
        Ok(found)
    };
    in_pool(threads, compute)
}

pub(super) fn in_pool<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.unwrap().install(f)
}

#[test]
fn a_result_does_not_depend_on_the_number_of_threads() -> Result<()> {
    for images in [1, 3] {
        let t = sized([images, 150], 96, 64);
        let expected = on_threads(&t, 1)?;
        for threads in [2, 3, 8, 40] {
            for (found, expected) in on_threads(&t, threads)?.iter().zip(&expected) {
                assert_eq!(distance(found, expected), 0.0);
            }
        }
    }
    Ok(())
}

#[test]
fn other_tensors_are_never_taken_for_the_prepared_ones() -> Result<()> {
    let t = inputs(2, 5);
    let mut p = parameters(&t);
    let first = transformer_block(&t[0], &p, None, false)?.0;
    let shared = p.clone();
    p.fc1[0] = (&t[9] * 2.0)?.detach();
    let other = transformer_block(&t[0], &p, None, false)?.0;
    assert!(distance(&other, &composed(&t[0], &p, None, false)?.0) < 1e-5);
    let again = transformer_block(&t[0], &shared, None, false)?.0;
    assert_eq!(distance(&first, &again), 0.0);
    let mut other_heads = shared.clone();
    other_heads.heads = 6;
    let other = transformer_block(&t[0], &other_heads, None, false)?.0;
    assert!(distance(&other, &composed(&t[0], &other_heads, None, false)?.0) < 1e-5);
    // A variable changes in place, under the same name.
    let var = candle_core::Var::from_tensor(&t[3])?;
    p.qkv[0] = var.as_tensor().clone();
    let before = transformer_block(&t[0], &p, None, false)?.0;
    var.set(&(&t[3] * 3.0)?)?;
    let after = transformer_block(&t[0], &p, None, false)?.0;
    assert!(distance(&before, &after) > 1e-3);
    // The tripled queries make the logits large, and sums in another order differ by more.
    assert!(distance(&after, &composed(&t[0], &p, None, false)?.0) < 5e-5);
    Ok(())
}

#[test]
fn only_what_is_tracked_gets_a_gradient() -> Result<()> {
    let t = inputs(2, 6);
    let bias = candle_core::Var::from_tensor(&t[4])?;
    let mut tracked = t.clone();
    tracked[4] = bias.as_tensor().clone();
    let grads = run(&tracked, None)?.sum_all()?.backward()?;
    assert!(grads.get(&bias).is_some());
    assert!(grads.get(&tracked[0]).is_none() && grads.get(&tracked[3]).is_none());
    Ok(())
}

#[test]
fn two_backward_passes_agree() -> Result<()> {
    let t = inputs(2, 6);
    let vars = t.iter().map(candle_core::Var::from_tensor);
    let vars = vars.collect::<Result<Vec<_>>>()?;
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let loss = run(&tensors, None)?.sqr()?.sum_all()?;
    let (first, second) = (loss.backward()?, loss.backward()?);
    for var in &vars {
        let [a, b] = [&first, &second].map(|grads| grads.get(var).unwrap());
        assert_eq!(distance(a, b), 0.0);
    }
    Ok(())
}

#[test]
fn misfitting_shapes_are_errors() {
    let mut t = inputs(2, 5);
    t[11] = noise(&[12, 19], 0);
    assert!(run(&t, None).is_err());
    let t = inputs(2, 5);
    assert!(run(&t, Some(&[vec![1.0], vec![1.0]])).is_err());
}
