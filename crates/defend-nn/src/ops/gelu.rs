//! The exact (erf) GELU activation.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{from_vec, is_fast, slice, with_slices};
use defend_kernels::math;
use defend_kernels::vectorised;

/// Elements a parallel task handles: 64 KiB, half of a level-1 cache's worth of reads and writes.
const ELEMENTS_PER_TASK: usize = 16 * 1024;

/// Exact GELU, `x Φ(x)` (not the tanh approximation): the activation of ViT checkpoints.
///
/// Any shape; differentiable.
///
/// # Errors
/// When candle fails.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if is_fast(&[x]) {
        x.contiguous()?.apply_op1(Gelu)
    } else {
        x.gelu_erf()
    }
}

struct Gelu;

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice("gelu", x, layout)?;
        let mut out = vec![0f32; x.len()];
        out.par_chunks_mut(ELEMENTS_PER_TASK)
            .zip(x.par_chunks(ELEMENTS_PER_TASK))
            .for_each(|(out, x)| {
                vectorised!(|| out.iter_mut().zip(x).for_each(|(o, &v)| *o = math::gelu(v)));
            });
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        with_slices("gelu", [x, grad], |[xs, gs]| {
            let mut dx = vec![0f32; xs.len()];
            dx.par_chunks_mut(ELEMENTS_PER_TASK)
                .zip(xs.par_chunks(ELEMENTS_PER_TASK))
                .zip(gs.par_chunks(ELEMENTS_PER_TASK))
                .for_each(|((dx, x), g)| {
                    vectorised!(|| {
                        for ((d, &x), &g) in dx.iter_mut().zip(x).zip(g) {
                            *d = g * math::gelu_and_derivative(x).1;
                        }
                    });
                });
            from_vec(dx, x.dims()).map(Some)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradients, noise};
    use super::*;

    #[test]
    fn gradients_match_finite_differences() {
        check_gradients(&[(noise(&[5, 33], 1) * 3.0).unwrap()], |t| gelu(&t[0]));
    }
}
