//! Affine maps `y = x W^T + b`, alone or followed by GELU.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{from_vec, is_fast, slice, with_slices};
use crate::gradient_routing::route;
use defend_kernels::microkernel::{Accumulate, Target};
use defend_kernels::pack::{Packed, PackedView};
use defend_kernels::panel_layout::{PanelLayout, Rows, Stack, fill, fill_pieces};
use defend_kernels::pool::Buffer;
use defend_kernels::product::product;
use defend_kernels::vectorised;
use defend_kernels::weight_gradient::weight_gradient;
use defend_kernels::{ROWS_PER_TASK, column_sums, math};

/// Affine map of the last dimension: `x W^T + b`.
///
/// `x`: `[..., I]`; `weight`: `[O, I]`; `bias`: `[O]`; returns `[..., O]`. Differentiable with respect
/// to all three. A row's result depends on no other row.
///
/// # Errors
/// When the shapes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    if is_fast(&[x, weight, bias]) {
        let op = Linear::new([x, weight, bias], Activation::None);
        return x
            .contiguous()?
            .apply_op3(&weight.contiguous()?, &bias.contiguous()?, op);
    }
    mapped(x, weight, |rows| add_bias(rows, bias))
}

/// `gelu(linear(x, weight, bias))`, the activation applied while the product is still in the cache.
///
/// Shapes as [`linear`]. When a gradient will be asked for, the two operations are recorded separately.
///
/// # Errors
/// When the shapes do not fit.
pub fn linear_gelu(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let tracked = [x, weight, bias].iter().any(|t| t.track_op());
    #[cfg(feature = "cuda")]
    if !tracked && x.elem_count() > 0 && fits_cuda(weight.dims().first(), weight, bias) {
        let bias = defend_cuda_kernels::aligned(bias)?;
        return mapped(x, weight, |rows| {
            defend_cuda_kernels::rows::bias_gelu(rows, &bias)
        });
    }
    if tracked || !is_fast(&[x, weight, bias]) {
        return super::gelu(&linear(x, weight, bias)?);
    }
    let op = Linear::new([x, weight, bias], Activation::Gelu);
    x.contiguous()?
        .apply_op3_no_bwd(&weight.contiguous()?, &bias.contiguous()?, &op)
}

/// Rows plus a row: `x` `[..., C]`, `bias` `[C]`; differentiable with respect to both.
///
/// # Errors
/// When the shapes do not fit.
pub fn add_bias(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if fits_cuda(x.dims().last(), x, bias) {
        use super::cuda::{BiasGradient, Precomputed};
        let (x, bias) = (
            defend_cuda_kernels::aligned(x)?,
            defend_cuda_kernels::aligned(bias)?,
        );
        let out = defend_cuda_kernels::rows::bias_add(&x, &bias)?;
        if !x.track_op() && !bias.track_op() {
            return Ok(out);
        }
        return x.apply_op2(&bias, Precomputed::new("bias", out, BiasGradient));
    }
    x.broadcast_add(bias)
}

/// Whether the CUDA kernels take a bias `[width]` for rows in the type of `like`.
#[cfg(feature = "cuda")]
fn fits_cuda(width: Option<&usize>, like: &Tensor, bias: &Tensor) -> bool {
    let one = bias.rank() == 1 && bias.dims().first() == width;
    one && bias.dtype() == like.dtype() && defend_cuda_kernels::takes(bias) && like.elem_count() > 0
}

/// `finish(x W^T)` with the rows of `x` `[..., I]` as `[R, I]`; returns `[..., O]`.
fn mapped(
    x: &Tensor,
    weight: &Tensor,
    finish: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let rows = x.reshape(((), x.dim(candle_core::D::Minus1)?))?;
    let out = finish(&rows.matmul(&weight.t()?)?)?;
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = weight.dim(0)?;
    }
    out.reshape(shape)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Activation {
    None,
    Gelu,
}

struct Linear {
    activation: Activation,
    /// Whether x, weight and bias need a gradient.
    needs: [bool; 3],
}

impl Linear {
    fn new(operands: [&Tensor; 3], activation: Activation) -> Self {
        Self {
            activation,
            needs: operands.map(Tensor::track_op),
        }
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (&[outputs, inputs], dims) = (lw.dims(), lx.dims()) else {
            bail!(
                "linear needs a weight of two dimensions, got {:?}",
                lw.dims()
            )
        };
        if dims.last() != Some(&inputs) || lb.dims() != [outputs] {
            bail!(
                "linear: input {dims:?} and bias {:?} do not fit a weight of [{outputs}, {inputs}]",
                lb.dims()
            )
        }
        let (xs, ws, bs) = (
            slice("linear", x, lx)?,
            slice("linear", w, lw)?,
            slice("linear", b, lb)?,
        );
        let mut shape = dims.to_vec();
        if let Some(last) = shape.last_mut() {
            *last = outputs;
        }
        let mut out = vec![0f32; xs.len() / inputs * outputs];
        let weight =
            Packed::transposed(ws, PanelLayout::whole(inputs), PanelLayout::whole(outputs));
        map_rows(&mut out, Accumulate::Bias(bs), xs, &weight, |out| {
            if self.activation == Activation::Gelu {
                vectorised!(|| out.iter_mut().for_each(|v| *v = math::gelu(*v)));
            }
        });
        Ok((CpuStorage::F32(out), Shape::from(shape)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (outputs, inputs) = weight.dims2()?;
        let rows = grad.elem_count() / outputs;
        let [inner, outer] = [inputs, outputs].map(PanelLayout::whole);
        let [dx, dw, db] = with_slices("linear", [x, weight, grad], |[xs, ws, gs]| {
            let dx = self.needs[0].then(|| {
                let mut dx = vec![0f32; rows * inputs];
                let weight = Packed::new(ws, outer, inner);
                map_rows(&mut dx, Accumulate::Replace, gs, &weight, |_| ());
                from_vec(dx, x.dims())
            });
            let dw = self.needs[1].then(|| {
                let blocks = |values, columns| fill_pieces(values, columns, ROWS_PER_TASK);
                let (g, x) = (blocks(gs, outer), blocks(xs, inner));
                let [g, x] = [(&g, outer), (&x, inner)].map(|(values, columns)| Stack {
                    values,
                    rows,
                    piece: ROWS_PER_TASK,
                    columns,
                });
                from_vec(weight_gradient(g, x), (outputs, inputs))
            });
            let db = self.needs[2].then(|| from_vec(column_sums(gs, outputs), outputs));
            Ok([dx.transpose()?, dw.transpose()?, db.transpose()?])
        })?;
        Ok((dx, route(weight, dw), route(bias, db)))
    }
}

/// `out = start + x M` for row-major rows, and `finish` for each task's rows.
fn map_rows(
    out: &mut [f32],
    start: Accumulate<'_>,
    x: &[f32],
    matrix: &Packed,
    finish: impl Fn(&mut [f32]) + Sync,
) {
    let PackedView { depth, columns, .. } = matrix.panels();
    // A row's result depends on no other row, so few rows may be spread over all threads.
    let rows = x.len() / depth.count;
    let task = rows.div_ceil(rayon::current_num_threads());
    let task = task.clamp(1, ROWS_PER_TASK);
    let tasks = out.par_chunks_mut(task * columns.count);
    tasks.zip(x.par_chunks(task * depth.count)).for_each_init(
        || Buffer::recycled(depth.values(task)),
        |blocks, (out, x)| {
            let rows = x.len() / depth.count;
            let blocks = &mut blocks[..depth.values(rows)];
            fill(blocks, x, depth, 1.0);
            let x = Rows::all(blocks, rows, depth);
            product(Target::RowMajor(out), start, &x, matrix.panels(), 1.0);
            finish(out);
        },
    );
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradients, distance, noise};
    use super::*;
    use candle_core::{DType, Var};

    #[test]
    fn gradients_match_finite_differences() {
        let inputs = [noise(&[2, 7, 24], 1), noise(&[40, 24], 2), noise(&[40], 3)];
        check_gradients(&inputs, |t| linear(&t[0], &t[1], &t[2]));
        check_gradients(&inputs, |t| linear_gelu(&t[0], &t[1], &t[2]));
    }

    #[test]
    fn fused_gelu_equals_the_two_steps() -> Result<()> {
        let (x, w, b) = (noise(&[3, 5, 8], 1), noise(&[12, 8], 2), noise(&[12], 3));
        let two_steps = super::super::gelu(&linear(&x, &w, &b)?)?;
        assert!(distance(&linear_gelu(&x, &w, &b)?, &two_steps) < 1e-7);
        Ok(())
    }

    #[test]
    fn frozen_operands_get_no_gradient() -> Result<()> {
        let (x, w) = (noise(&[4, 8], 1), noise(&[12, 8], 2));
        let b = Var::from_tensor(&noise(&[12], 3))?;
        let grads = linear(&x, &w, &b)?.sum_all()?.backward()?;
        assert!(grads.get(&b).is_some() && grads.get(&x).is_none() && grads.get(&w).is_none());
        Ok(())
    }

    #[test]
    fn an_image_does_not_depend_on_its_batch() -> Result<()> {
        let (x, w, b) = (noise(&[9, 50, 64], 1), noise(&[96, 64], 2), noise(&[96], 3));
        let whole = linear(&x, &w, &b)?;
        for i in 0..9 {
            let alone = linear(&x.narrow(0, i, 1)?, &w, &b)?;
            assert_eq!(distance(&alone, &whole.narrow(0, i, 1)?), 0.0);
        }
        Ok(())
    }

    #[test]
    fn few_rows_are_spread_and_none_are_nothing() -> Result<()> {
        let (w, b) = (noise(&[12, 8], 2), noise(&[12], 3));
        let x = noise(&[7, 8], 1);
        let expected = x.matmul(&w.t()?)?.broadcast_add(&b)?;
        assert!(distance(&linear(&x, &w, &b)?, &expected) < 1e-6);
        let none = noise(&[0, 5, 8], 1);
        assert_eq!(linear(&none, &w, &b)?.dims(), [0, 5, 12]);
        assert_eq!(linear_gelu(&none, &w, &b)?.dims(), [0, 5, 12]);
        Ok(())
    }

    #[test]
    fn misfitting_shapes_are_errors() {
        let (x, w, b) = (noise(&[4, 7], 1), noise(&[12, 8], 2), noise(&[12], 3));
        assert!(linear(&x, &w, &b).is_err());
        let x = x.to_dtype(DType::F64).unwrap();
        assert!(linear(&x, &w, &b).is_err());
    }
}
