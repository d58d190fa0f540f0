//! Results of the CUDA kernels as nodes of candle's graph.

use std::sync::{Mutex, PoisonError};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Storage,
    Tensor, bail,
};

use crate::cuda::{aligned, rows};

/// An operation whose result is there already, and how gradients pass it.
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

    fn take(&self) -> Result<(CudaStorage, Shape)> {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(out) = out.take() else {
            bail!("{}: its result was taken before", self.name)
        };
        storage_of(&out)
    }
}

/// A copy of a tensor's storage: candle lets nobody take it out of a tensor.
pub(super) fn storage_of(t: &Tensor) -> Result<(CudaStorage, Shape)> {
    use candle_core::backend::BackendStorage;
    let (storage, layout) = t.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        bail!("a result of a CUDA kernel is on another device")
    };
    Ok((storage.try_clone(layout)?, layout.shape().clone()))
}

fn not_here<T>(name: &str) -> Result<T> {
    bail!("{name}: the CUDA form of this operation met tensors on the CPU")
}

/// LayerNorm of which this keeps the rows' means and inverse standard deviations.
pub(super) struct NormGradients(pub(super) Tensor);

impl CustomOp3 for Precomputed<NormGradients> {
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
        not_here(self.name)
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
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (g, kept) = (aligned(grad)?, &self.gradients.0);
        let dx = || rows::layer_norm_backward(x, kept, weight, &g, None);
        let dx = x.track_op().then(dx).transpose()?;
        if !weight.track_op() && !bias.track_op() {
            return Ok((dx, None, None));
        }
        let [dw, db] = rows::norm_sums(&g, x, kept)?;
        let of = |t: &Tensor, gradient| t.track_op().then_some(gradient);
        Ok((dx, of(weight, dw), of(bias, db)))
    }
}

/// L2 normalisation of which this keeps the rows' lengths.
pub(super) struct Lengths(pub(super) Tensor);

impl CustomOp1 for Precomputed<Lengths> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        not_here(self.name)
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.take()
    }

    fn bwd(&self, _: &Tensor, out: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        rows::l2_normalize_backward(out, &self.gradients.0, &aligned(grad)?).map(Some)
    }
}

/// Rows picked from a table, `[R]`.
pub(super) struct Picked(pub(super) Tensor);

impl CustomOp1 for Precomputed<Picked> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        not_here(self.name)
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.take()
    }

    fn bwd(&self, table: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let rows = table.dim(0)?;
        rows::scatter_rows(&self.gradients.0, &aligned(grad)?, rows).map(Some)
    }
}

/// Rows plus a bias.
pub(super) struct BiasGradient;

impl CustomOp2 for Precomputed<BiasGradient> {
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
        not_here(self.name)
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
        rows: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let sums = || rows::column_sums(&aligned(grad)?);
        let sums = bias.track_op().then(sums).transpose()?;
        Ok((rows.track_op().then(|| grad.clone()), sums))
    }
}
