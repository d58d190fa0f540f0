//! Parameters of a transformer block, and its matrices as the kernel wants them.

use std::sync::{Arc, OnceLock};

use candle_core::{Result, Tensor, TensorId, bail};
use defend_kernels::transformer_block::{self as kernel, Matrices};
use serde::{Deserialize, Serialize};

use super::super::{is_fast, with_slices};

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
/// that train, or whose bias or LayerScale does, are repacked in every call.
#[derive(Debug, Clone, Default)]
pub struct Prepared(Arc<OnceLock<(PreparedOf, Arc<Matrices>)>>);

/// The tensors, the number of heads, and the arithmetic.
type PreparedOf = (Vec<TensorId>, usize, ComputePrecision);

impl BlockParameters {
    /// The matrices for a forward pass, with LayerScale in them.
    pub(super) fn matrices(&self, compute_precision: ComputePrecision) -> Result<Arc<Matrices>> {
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
                let matrices = Arc::new(make()?.cached());
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

    pub(super) fn check_scales(&self) -> Result<()> {
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
    pub(super) fn shape(&self, x: (usize, usize, usize), threads: usize) -> kernel::Shape<'static> {
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
    pub(super) fn folded(&self) -> Result<Self> {
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
    pub(super) fn with_weights<R>(&self, f: impl FnOnce(kernel::Weights<'_>) -> R) -> Result<R> {
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
    pub(super) fn track_op(&self) -> bool {
        self.all_tensors().any(Tensor::track_op)
    }

    /// Whether the CPU's kernel takes them.
    pub(super) fn is_fast(&self) -> bool {
        self.all_tensors().all(|tensor| is_fast(&[tensor]))
    }

    fn all_tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.tensors().into_iter().chain(self.scales())
    }

    /// All but LayerScale's, in the kernel's order.
    pub(super) fn tensors(&self) -> [&Tensor; 12] {
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

/// Of the parameters for D channels and so many hidden ones, in the order of [`BlockParameters::tensors`].
pub(super) fn shapes(d: usize, hidden: usize) -> [Vec<usize>; 12] {
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
pub(super) fn check(
    x: &Tensor,
    p: &BlockParameters,
    factors: Option<&BranchFactors>,
) -> Result<()> {
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
