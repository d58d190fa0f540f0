//! Differentiable operations of a Vision Transformer, fused for `f32` CPU tensors.
//!
//! Each function has two forms with the same meaning: a kernel for contiguous `f32` tensors on the
//! CPU, and a composition of candle's differentiable primitives for every other device and type. With the `cuda` feature most
//! have kernels for NVIDIA's cards as well.
//! Gradients flow to every operand that is a variable or depends on one; operands that do not (frozen
//! weights, plain inputs) cost nothing in the backward pass.

mod adamw;
mod attention;
#[cfg(feature = "cuda")]
mod cuda;
mod gelu;
mod layer_norm;
mod linear;
mod local_attention;
mod normalize;
mod patches;
mod pick;
mod transformer_block;

pub use adamw::{AdamWOperands, adamw, gradient_norm, not_finite as adamw_not_finite};
pub use attention::{attention, cls_attention};
pub use defend_kernels::adamw::AdamWStep;
pub use gelu::gelu;
pub use layer_norm::layer_norm;
pub use linear::{add_bias, linear, linear_gelu};
pub use local_attention::local_attention;
pub use normalize::l2_normalize;
pub use patches::patches;
pub use pick::{pick_of_each, pick_rows};
pub use transformer_block::{
    BlockParameters, BranchFactors, ComputePrecision, Prepared, transformer_block,
    transformer_blocks,
};

use candle_core::{CpuStorage, DType, Layout, Result, Shape, Tensor, bail};

use crate::gradient_routing::without_sink;

/// Whether the fused CPU kernels apply to all of these tensors: none is empty.
pub(crate) fn is_fast(tensors: &[&Tensor]) -> bool {
    tensors
        .iter()
        .all(|t| t.device().is_cpu() && t.dtype() == DType::F32 && t.elem_count() > 0)
}

/// The contiguous `f32` slice of an operand inside a custom operation.
pub(crate) fn slice<'a>(op: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!(
            "{op} needs contiguous tensors, got strides {:?}",
            layout.stride()
        )
    };
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// Calls `f` with the contiguous `f32` contents of CPU tensors; `op` is named in errors.
///
/// # Errors
/// Those of `f`, and when a tensor is of another device or type.
pub fn with_slices<const N: usize, R>(
    op: &str,
    tensors: [&Tensor; N],
    f: impl FnOnce([&[f32]; N]) -> Result<R>,
) -> Result<R> {
    let contiguous = tensors
        .iter()
        .map(|t| t.contiguous())
        .collect::<Result<Vec<_>>>()?;
    let guards: Vec<_> = contiguous.iter().map(Tensor::storage_and_layout).collect();
    let mut slices = [&[] as &[f32]; N];
    for (target, (storage, layout)) in slices.iter_mut().zip(&guards) {
        let candle_core::Storage::Cpu(storage) = &**storage else {
            bail!("{op} reached its CPU kernel with a tensor of another device")
        };
        *target = slice(op, storage, layout)?;
    }
    without_sink(|| f(slices))
}

/// A CPU tensor around freshly computed values.
fn from_vec(values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), &candle_core::Device::Cpu)
}

#[cfg(test)]
pub(crate) mod testing {
    //! Gradient checks shared by the operations' tests.
    use candle_core::{DType, Device, Result, Tensor, Var};

    /// A deterministic pseudo-random tensor in `-1..1`.
    pub(crate) fn noise(shape: &[usize], seed: u64) -> Tensor {
        use rand::RngExt;
        let mut rng = crate::Rng::seed(seed);
        let n = shape.iter().product();
        let values: Vec<f32> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// Largest absolute difference between two tensors of the same shape.
    pub(crate) fn distance(a: &Tensor, b: &Tensor) -> f64 {
        assert_eq!(a.dims(), b.dims());
        let d = (a.to_dtype(DType::F64).unwrap() - b.to_dtype(DType::F64).unwrap()).unwrap();
        d.abs()
            .unwrap()
            .flatten_all()
            .unwrap()
            .max(0)
            .unwrap()
            .to_scalar::<f64>()
            .unwrap()
    }

    /// Checks `f`'s gradients with respect to every input twice: the composed form in `f64` against
    /// central finite differences, and the fused `f32` form against the composed one.
    pub(crate) fn check_gradients(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
        let gradients = |dtype: DType| -> (Tensor, Vec<Tensor>) {
            let vars: Vec<Var> = inputs
                .iter()
                .map(|t| Var::from_tensor(&t.to_dtype(dtype).unwrap()).unwrap())
                .collect();
            let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
            let out = f(&tensors).unwrap();
            let weight = noise(out.dims(), 99).to_dtype(dtype).unwrap();
            let grads = (&out * weight)
                .unwrap()
                .sum_all()
                .unwrap()
                .backward()
                .unwrap();
            let grads = vars
                .iter()
                .map(|v| grads.get(v).expect("a gradient").clone())
                .collect();
            (out, grads)
        };
        let (out64, grads64) = gradients(DType::F64);
        let (out32, grads32) = gradients(DType::F32);
        assert!(
            distance(&out64, &out32) < 2e-5,
            "values {}",
            distance(&out64, &out32)
        );
        for (i, (a, b)) in grads64.iter().zip(&grads32).enumerate() {
            assert!(
                distance(a, b) < 1e-4,
                "fused gradient {i}: {}",
                distance(a, b)
            );
        }
        let objective = |tensors: &[Tensor]| -> f64 {
            let out = f(tensors).unwrap();
            let weight = noise(out.dims(), 99).to_dtype(DType::F64).unwrap();
            (&out * weight)
                .unwrap()
                .sum_all()
                .unwrap()
                .to_scalar()
                .unwrap()
        };
        let base: Vec<Tensor> = inputs
            .iter()
            .map(|t| t.to_dtype(DType::F64).unwrap())
            .collect();
        for (i, grad) in grads64.iter().enumerate() {
            let values = base[i].flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let grad = grad.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            // A stride that is coprime to the usual extents visits all rows and columns.
            for at in (0..values.len()).step_by(1 + values.len() / 17) {
                let moved = |step: f64| {
                    let mut values = values.clone();
                    values[at] += step;
                    let mut tensors = base.clone();
                    tensors[i] = Tensor::from_vec(values, base[i].shape(), &Device::Cpu).unwrap();
                    objective(&tensors)
                };
                let numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                assert!(
                    (numeric - grad[at]).abs() < 1e-5 * (1.0 + numeric.abs()),
                    "input {i} element {at}: finite difference {numeric}, backward {}",
                    grad[at]
                );
            }
        }
    }
}
