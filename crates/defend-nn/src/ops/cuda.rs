//! Results of the CUDA kernels as nodes of candle's graph.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Storage,
    Tensor, bail,
};

use crate::gradient_routing::route;
use defend_cuda_kernels::{aligned, rows};

/// How gradients pass an operation of N operands.
pub(super) trait Backward<const N: usize>: Send + Sync + 'static {
    /// The gradients of the operands that have one, from the result and its gradient.
    fn backward(
        &self,
        operands: [&Tensor; N],
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; N]>;
}

/// An operation whose result is there already: a node of candle's graph with operands of any number.
pub(super) struct Precomputed<G> {
    name: &'static str,
    out: Mutex<Option<Tensor>>,
    gradients: G,
}

impl<G> Precomputed<G> {
    pub(super) fn new(name: &'static str, out: Tensor, gradients: G) -> Self {
        Self {
            name,
            out: Mutex::new(Some(out)),
            gradients,
        }
    }

    /// A copy of the result's storage: candle lets nobody take it out of a tensor.
    fn take(&self) -> Result<(CudaStorage, Shape)> {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(out) = out.take() else {
            bail!("{}: its result was taken before", self.name)
        };
        let (storage, layout) = out.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            bail!("{}: its result is on another device", self.name)
        };
        Ok((storage.try_clone(layout)?, layout.shape().clone()))
    }

    fn not_here<T>(&self) -> Result<T> {
        bail!(
            "{}: the CUDA form of this operation met tensors on the CPU",
            self.name
        )
    }
}

impl<G: Backward<1>> CustomOp1 for Precomputed<G> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.not_here()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.take()
    }

    fn bwd(&self, a: &Tensor, out: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [a] = self.gradients.backward([a], out, grad)?;
        Ok(a)
    }
}

impl<G: Backward<2>> CustomOp2 for Precomputed<G> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.not_here()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.take()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [a, b] = self.gradients.backward([a, b], out, grad)?;
        Ok((a, b))
    }
}

impl<G: Backward<3>> CustomOp3 for Precomputed<G> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.not_here()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.take()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [da, db, dc] = self.gradients.backward([a, b, c], out, grad)?;
        Ok((route(a, da), route(b, db), route(c, dc)))
    }
}

/// LayerNorm of which this keeps the rows' means and inverse standard deviations.
pub(super) struct NormGradients(pub(super) Tensor);

impl Backward<3> for NormGradients {
    fn backward(
        &self,
        [x, weight, bias]: [&Tensor; 3],
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let (g, kept) = (aligned(grad)?, &self.0);
        let dx = || rows::layer_norm_backward(x, kept, weight, &g, None);
        let dx = x.track_op().then(dx).transpose()?;
        if !weight.track_op() && !bias.track_op() {
            return Ok([dx, None, None]);
        }
        let [dw, db] = rows::norm_sums(&g, x, kept)?;
        let of = |t: &Tensor, gradient| t.track_op().then_some(gradient);
        Ok([dx, of(weight, dw), of(bias, db)])
    }
}

/// L2 normalisation of which this keeps the rows' lengths.
pub(super) struct Lengths(pub(super) Tensor);

impl Backward<1> for Lengths {
    fn backward(
        &self,
        _: [&Tensor; 1],
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 1]> {
        let dx = rows::l2_normalize_backward(out, &self.0, &aligned(grad)?)?;
        Ok([Some(dx)])
    }
}

/// Rows picked from a table, `[R]`.
pub(super) struct Picked(pub(super) Tensor);

impl Backward<1> for Picked {
    fn backward(
        &self,
        [table]: [&Tensor; 1],
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 1]> {
        let sums = rows::scatter_rows(&self.0, &aligned(grad)?, table.dim(0)?)?;
        Ok([Some(sums)])
    }
}

/// Rows plus a bias.
pub(super) struct BiasGradient;

impl Backward<2> for BiasGradient {
    fn backward(
        &self,
        [rows, bias]: [&Tensor; 2],
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 2]> {
        let sums = || rows::column_sums(&aligned(grad)?);
        let sums = bias.track_op().then(sums).transpose()?;
        Ok([rows.track_op().then(|| grad.clone()), sums])
    }
}
