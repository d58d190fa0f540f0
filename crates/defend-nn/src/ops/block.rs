//! A whole pre-norm transformer block as one operation.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, TensorId, bail};
use serde::{Deserialize, Serialize};

use super::{attention, cls_attention, is_fast, layer_norm, linear, linear_gelu, with_slices};
use crate::backward::unless_taken;
use defend_kernels::block::{self as kernel, Matrices};

/// How frozen networks compute.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputePrecision {
    /// In `f32`.
    #[default]
    F32,
    /// In `bf16`, eight significant bits. On the CPU the matrices of the blocks, and the activations that are multiplied with
    /// them, are rounded; sums and all between the products are `f32`. Processors with AMX or AVX-512 BF16 have instructions for it,
    /// on others it gains nothing. Two kinds of processors differ by a part of what the rounding does: calibrate where you score.
    Bf16,
}

/// Factors of both branches of a block for each image: stochastic depth.
pub type BranchFactors = [Vec<f32>; 2];

/// Parameters of a pre-norm transformer block; matrices are `[O, I]`, vectors `[O]`.
#[derive(Debug, Clone)]
pub struct BlockParameters {
    /// Scale and shift of the LayerNorm before the attention, `[D]`.
    pub norm1: [Tensor; 2],
    /// Packed queries, keys and values, `[3 D, D]` and `[3 D]`.
    pub qkv: [Tensor; 2],
    /// Projection of the attention's output, `[D, D]` and `[D]`.
    pub projection: [Tensor; 2],
    /// Scale and shift of the LayerNorm before the MLP, `[D]`.
    pub norm2: [Tensor; 2],
    /// Into the MLP's hidden channels, `[H, D]` and `[H]`.
    pub fc1: [Tensor; 2],
    /// Out of them, `[D, H]` and `[D]`.
    pub fc2: [Tensor; 2],
    /// LayerScale: factors `[D]` of the attention's and the MLP's branch.
    pub scales: Option<[Tensor; 2]>,
    /// Attention heads; divides D.
    pub heads: usize,
    /// Added to the variance in both LayerNorms.
    pub eps: f64,
    /// How calls without a backward pass multiply on the CPU, with `f32` tensors.
    pub compute_precision: ComputePrecision,
    /// Frozen matrices as the kernel wants them, from the first call on.
    pub prepared: Prepared,
}

/// A frozen block's matrices in the layout of the CPU kernel; `default()` until the first call.
///
/// Clones share it. It is used with the tensors, the number of heads and the arithmetic that it was made of and no others. Matrices
/// that train, or whose bias or LayerScale does, are laid out anew in every call.
#[derive(Debug, Clone, Default)]
pub struct Prepared(Arc<OnceLock<(PreparedOf, Arc<Matrices>)>>);

/// The tensors, the number of heads, and the arithmetic.
type PreparedOf = (Vec<TensorId>, usize, ComputePrecision);

impl BlockParameters {
    /// The matrices for a forward pass, with LayerScale in them.
    fn matrices(&self, compute_precision: ComputePrecision) -> Result<Arc<Matrices>> {
        let make = || -> Result<Matrices> {
            let folded = self.folded()?;
            let matrices =
                folded.with_weights(|weights| Matrices::forward(&weights, self.heads))?;
            Ok(match compute_precision {
                ComputePrecision::F32 => matrices,
                ComputePrecision::Bf16 => matrices.rounded(),
            })
        };
        let matrices = [&self.qkv[0], &self.fc1[0]].into_iter();
        let of = matrices
            .chain(&self.projection)
            .chain(&self.fc2)
            .chain(self.scales());
        let of: Vec<&Tensor> = of.collect();
        if of.iter().any(|tensor| tensor.track_op()) {
            return Ok(Arc::new(make()?));
        }
        // The layout depends on the number of heads.
        let ids = of.iter().map(|tensor| tensor.id());
        let key = (ids.collect(), self.heads, compute_precision);
        match self.prepared.0.get() {
            Some((made_of, matrices)) if *made_of == key => Ok(Arc::clone(matrices)),
            Some(_) => Ok(Arc::new(make()?)),
            None => {
                let matrices = Arc::new(make()?.kept());
                // Threads that come here together make it each, and one of theirs stays.
                let _ = self.prepared.0.set((key, Arc::clone(&matrices)));
                Ok(matrices)
            }
        }
    }

    /// LayerScale's factors.
    fn scales(&self) -> impl Iterator<Item = &Tensor> {
        self.scales.iter().flatten()
    }

    fn check_scales(&self) -> Result<()> {
        for scale in self.scales() {
            let expected = self.norm1[0].dims();
            if scale.dims() != expected {
                bail!(
                    "transformer block: LayerScale has shape {:?}, expected {expected:?}",
                    scale.dims()
                )
            }
        }
        Ok(())
    }

    /// For an input `[B, T, D]` on so many threads, without stochastic depth.
    fn shape(&self, x: (usize, usize, usize), threads: usize) -> kernel::Shape<'static> {
        kernel::Shape {
            images: x.0,
            tokens: x.1,
            width: x.2,
            hidden: self.fc1[1].elem_count(),
            heads: self.heads,
            eps: self.eps as f32,
            factors: None,
            threads,
        }
    }

    /// The same block without LayerScale: its factors are in the matrices and the biases that end the branches, which carry
    /// gradients to it and to what they were made of.
    fn folded(&self) -> Result<Self> {
        let Some([s1, s2]) = &self.scales else {
            return Ok(self.clone());
        };
        let fold = |[matrix, bias]: &[Tensor; 2], scale: &Tensor| -> Result<[Tensor; 2]> {
            let rows = scale.unsqueeze(1)?;
            Ok([matrix.broadcast_mul(&rows)?, bias.mul(scale)?])
        };
        Ok(Self {
            projection: fold(&self.projection, s1)?,
            fc2: fold(&self.fc2, s2)?,
            scales: None,
            prepared: Prepared::default(),
            ..self.clone()
        })
    }

    /// Calls `f` with the values of all but LayerScale's.
    fn with_weights<R>(&self, f: impl FnOnce(kernel::Weights<'_>) -> R) -> Result<R> {
        with_slices("transformer block", self.tensors(), |slices| {
            let [a, b, c, d, e, f1, g, h, i, j, k, l] = slices;
            Ok(f(kernel::Weights {
                norm1: [a, b],
                qkv: [c, d],
                projection: [e, f1],
                norm2: [g, h],
                fc1: [i, j],
                fc2: [k, l],
            }))
        })
    }

    /// Whether any of them carries gradients.
    fn track_op(&self) -> bool {
        self.all_tensors().any(Tensor::track_op)
    }

    /// Whether the CPU's kernel takes them.
    fn is_fast(&self) -> bool {
        self.all_tensors().all(|tensor| is_fast(&[tensor]))
    }

    fn all_tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.tensors().into_iter().chain(self.scales())
    }

    /// All but LayerScale's, in the kernel's order.
    fn tensors(&self) -> [&Tensor; 12] {
        let groups = [
            &self.norm1,
            &self.qkv,
            &self.projection,
            &self.norm2,
            &self.fc1,
            &self.fc2,
        ];
        let [a, b, c, d, e, f] = groups.map(|[weight, bias]| [weight, bias]);
        [
            a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1], e[0], e[1], f[0], f[1],
        ]
    }
}

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
    chain::fused(x, &[(parameters, factors)], with_cls_attention)
}

/// A node of the graph below a block, from which the backward pass reaches the parameters that train after the block, and then
/// what `ticket` reaches: a number, or the ticket of another block.
fn with_ticket(
    mut ticket: Tensor,
    tensors: &[&Tensor; 12],
    gradients: &Gradients,
) -> Result<Tensor> {
    if tensors.iter().any(|p| p.track_op()) {
        for pair in 0..6 {
            let deliver = Deliver {
                gradients: Arc::clone(gradients),
                pair,
            };
            ticket = ticket.apply_op3(tensors[2 * pair], tensors[2 * pair + 1], deliver)?;
        }
    }
    Ok(ticket)
}

/// The same from the other operations.
fn composed(
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

/// Of the parameters for D channels and so many hidden ones, in the order of [`BlockParameters::tensors`].
fn shapes(d: usize, hidden: usize) -> [Vec<usize>; 12] {
    [
        vec![d],
        vec![d],
        vec![3 * d, d],
        vec![3 * d],
        vec![d, d],
        vec![d],
        vec![d],
        vec![d],
        vec![hidden, d],
        vec![hidden],
        vec![d, hidden],
        vec![d],
    ]
}

/// Refuses what the kernel would read beyond its bounds.
fn check(x: &Tensor, p: &BlockParameters, factors: Option<&BranchFactors>) -> Result<()> {
    let (b, t, d) = x.dims3()?;
    let hidden = p.fc1[1].elem_count();
    for (found, expected) in p.tensors().iter().zip(shapes(d, hidden)) {
        if found.dims() != expected {
            bail!(
                "transformer block: a parameter has shape {:?}, expected {expected:?}",
                found.dims()
            )
        }
    }
    if b == 0 || t == 0 || d == 0 || hidden == 0 || p.heads == 0 || d % p.heads != 0 {
        bail!(
            "transformer block: input {:?} and {hidden} hidden channels do not fit {} heads",
            x.dims(),
            p.heads
        )
    }
    if let Some([f1, f2]) = factors
        && (f1.len() != b || f2.len() != b)
    {
        bail!(
            "transformer block: {} and {} factors for {b} images",
            f1.len(),
            f2.len()
        )
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A poisoned lock means that a thread panicked elsewhere: what is stored is replaced as a whole, never half.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gradients of the parameters, in the order of [`BlockParameters::tensors`], once the block's backward pass has run.
type Gradients = Arc<Mutex<Option<Vec<Tensor>>>>;

/// Hands the gradients of two parameters to candle's backward pass.
struct Deliver {
    gradients: Gradients,
    /// Index of the pair in [`BlockParameters::tensors`].
    pair: usize,
}

impl CustomOp3 for Deliver {
    fn name(&self) -> &'static str {
        "transformer-block-gradients"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        ticket: &candle_core::CudaStorage,
        layout: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        Ok((ticket.try_clone(layout)?, layout.shape().clone()))
    }

    fn bwd(
        &self,
        ticket: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let gradients = lock(&self.gradients);
        let Some(gradients) = &*gradients else {
            bail!("transformer block: its gradients were asked for before its backward pass")
        };
        let of = |t: &Tensor, i: usize| {
            let found = t.track_op().then(|| gradients[2 * self.pair + i].clone());
            unless_taken(t, found)
        };
        let ticket = ticket.track_op().then(|| ticket.zeros_like()).transpose()?;
        Ok((ticket, of(weight, 0), of(bias, 1)))
    }
}

pub(super) mod chain;
#[cfg(feature = "cuda")]
mod cuda;

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::super::testing::{check_gradients, distance, noise};
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
}
