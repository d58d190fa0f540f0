//! NVIDIA graphics cards: what a transformer block does between its matrix products, and AdamW, as kernels of our own.
//!
//! Products are candle's (cuBLAS). `tests/devices.rs` of `defend-core` compares everything with the CPU.

pub(crate) mod adamw;
pub(crate) mod block;
#[allow(unsafe_code)]
mod launch;
pub(crate) mod rows;

use candle_core::{DType, Tensor};

/// Values that a row must be a multiple of, so that every thread moves 16 bytes.
pub(crate) const ALIGNMENT: usize = 8;

/// Whether the kernels take this tensor: on a CUDA device, in a type that they have, with rows of whole packs.
pub(crate) fn takes(t: &Tensor) -> bool {
    let kind = matches!(t.dtype(), DType::F32 | DType::BF16 | DType::F16);
    let width = t.dims().last().copied().unwrap_or(0);
    t.device().is_cuda() && kind && width > 0 && width % ALIGNMENT == 0 && t.elem_count() > 0
}
