//! NVIDIA graphics cards, with the feature `cuda`: what a transformer block does between its matrix products, and AdamW, as kernels of our own.
//!
//! Products are candle's (cuBLAS). `tests/devices.rs` of `defend-core` compares everything with the CPU.

#![cfg(feature = "cuda")]

pub mod adamw;
pub mod block;
#[allow(unsafe_code)]
mod launch;
pub mod rows;

use candle_core::{DType, Result, Tensor};

/// Values that a row must be a multiple of, so that every thread moves 16 bytes.
pub const ALIGNMENT: usize = 8;

/// A contiguous tensor that begins at a multiple of 16 bytes, as the kernels want it.
///
/// # Errors
/// Those of candle and of the CUDA driver.
pub fn aligned(t: &Tensor) -> Result<Tensor> {
    if is_aligned(t) {
        Ok(t.clone())
    } else {
        t.force_contiguous()
    }
}

/// Whether [`aligned`] has nothing to do.
pub fn is_aligned(t: &Tensor) -> bool {
    let start = t.layout().start_offset() * t.dtype().size_in_bytes();
    t.is_contiguous() && start.is_multiple_of(16)
}

/// Whether the kernels take this tensor, once it is [`aligned`]: on a CUDA device, in a type that they have, with rows of whole packs.
pub fn takes(t: &Tensor) -> bool {
    let kind = matches!(t.dtype(), DType::F32 | DType::BF16 | DType::F16);
    let width = t.dims().last().copied().unwrap_or(0);
    t.device().is_cuda() && kind && width > 0 && width % ALIGNMENT == 0 && t.elem_count() > 0
}
