//! Launches of our kernels on candle's tensors.

use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, LaunchConfig, PushKernelArg, SyncOnDrop, sys,
};
use candle_core::cuda_backend::{CudaDevice, CudaStorageSlice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Device, Layout, Result, Shape, Storage, Tensor, bail};

/// `kernels.cu`, compiled by the build script; the driver makes machine code of it.
const KERNELS: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));

/// Rows that a block of [`rows`] handles: `WARPS` of the kernels.
pub(super) const WARPS: u32 = 8;

/// Whether there is such a kernel: some need a newer processor than the build may have been for.
pub(super) fn has_kernel(name: &str) -> bool {
    KERNELS.contains(&format!(".entry {name}("))
}

/// A number among a kernel's arguments.
#[derive(Clone, Copy)]
pub(super) enum Number {
    /// `int`.
    Int(usize),
    /// `unsigned`.
    Count(usize),
    Float(f64),
}

impl From<usize> for Number {
    fn from(value: usize) -> Self {
        Self::Int(value)
    }
}

impl From<f64> for Number {
    fn from(value: f64) -> Self {
        Self::Float(value)
    }
}

/// Extents of a launch: blocks and the threads of each.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    pub(super) blocks: [usize; 2],
    pub(super) threads: [u32; 2],
}

impl Grid {
    /// A warp for each row.
    pub(super) fn rows(rows: usize) -> Self {
        Self {
            blocks: [rows.div_ceil(WARPS as usize), 1],
            threads: [32, WARPS],
        }
    }

    /// A thread for each item.
    pub(super) fn items(items: usize) -> Self {
        Self {
            blocks: [items.div_ceil(256), 1],
            threads: [256, 1],
        }
    }
}

/// The CUDA device of a tensor.
pub(super) fn device(t: &Tensor) -> Result<CudaDevice> {
    match t.device() {
        Device::Cuda(device) => Ok(device.clone()),
        other => bail!("a CUDA kernel met a tensor on {:?}", other.location()),
    }
}

/// A tensor whose values are still to be written, like another in place and type.
pub(super) fn empty(shape: impl Into<Shape>, like: &Tensor) -> Result<Tensor> {
    empty_of(shape, like.dtype(), like)
}

/// The same in another type.
pub(super) fn empty_of(shape: impl Into<Shape>, dtype: DType, like: &Tensor) -> Result<Tensor> {
    let (shape, device) = (shape.into(), device(like)?);
    prepare(&device);
    let count = shape.elem_count();
    // SAFETY: the memory is not initialised. Its only users are the kernels of this module, each of which writes every value
    // of its outputs, in the order of the stream, before anything reads them.
    let slice = unsafe {
        match dtype {
            DType::F32 => CudaStorageSlice::F32(device.alloc(count)?),
            DType::BF16 => CudaStorageSlice::BF16(device.alloc(count)?),
            DType::F16 => CudaStorageSlice::F16(device.alloc(count)?),
            other => bail!("no CUDA kernel for {other:?}"),
        }
    };
    let storage = Storage::Cuda(CudaStorage { slice, device });
    Ok(Tensor::from_storage(
        storage,
        shape,
        BackpropOp::none(),
        false,
    ))
}

/// Makes allocations cheap, once for each device: a training step has more than a thousand of them.
///
/// By default the driver gives all freed memory back at every wait for the device, so each step would ask for gigabytes anew.
/// And cudarc makes two events for each allocation, for programs that use one device's memory from several of its streams.
fn prepare(device: &CudaDevice) {
    static DONE: AtomicU64 = AtomicU64::new(0);
    let stream = device.cuda_stream();
    let context = stream.context();
    if !context.is_in_multi_stream_mode() && context.is_event_tracking() {
        // SAFETY: events order the streams of one context among each other, and this context has none so far but the one that
        // candle gave the device; a program that makes more there later is told so in docs/DEVICES.md. Streams of other
        // threads are not ordered by events either way, as candle makes its device.
        unsafe { device.disable_event_tracking() };
    }
    let ordinal = context.ordinal();
    let bit = 1 << (ordinal % 64);
    if DONE.fetch_or(bit, Ordering::Relaxed) & bit != 0 {
        return;
    }
    let mut threshold = u64::MAX;
    let mut pool = std::ptr::null_mut();
    let mut id = 0;
    let release = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    let done = sys::CUresult::CUDA_SUCCESS;
    // SAFETY: plain calls of the driver with pointers to live variables of the types that it documents. Where one fails,
    // the pool stays as it was, which costs time and nothing else.
    unsafe {
        if sys::cuDeviceGet(&raw mut id, ordinal as i32) == done
            && sys::cuDeviceGetDefaultMemPool(&raw mut pool, id) == done
        {
            let _ = sys::cuMemPoolSetAttribute(pool, release, (&raw mut threshold).cast());
        }
    }
}

/// Address of a tensor's first value, and what tells cudarc when it is no longer used.
fn address<'a>(
    storage: &'a CudaStorage,
    layout: &Layout,
    stream: &'a CudaStream,
) -> Result<(u64, SyncOnDrop<'a>)> {
    fn of<'a, T>(
        slice: &'a CudaSlice<T>,
        layout: &Layout,
        stream: &'a CudaStream,
    ) -> (u64, SyncOnDrop<'a>) {
        let (start, sync) = slice.device_ptr(stream);
        (
            start + (layout.start_offset() * size_of::<T>()) as u64,
            sync,
        )
    }
    if !layout.is_contiguous() {
        bail!(
            "a CUDA kernel met a tensor with strides {:?}",
            layout.stride()
        )
    }
    let (address, sync) = match &storage.slice {
        CudaStorageSlice::F32(slice) => of(slice, layout, stream),
        CudaStorageSlice::BF16(slice) => of(slice, layout, stream),
        CudaStorageSlice::F16(slice) => of(slice, layout, stream),
        CudaStorageSlice::U32(slice) => of(slice, layout, stream),
        _ => bail!("no CUDA kernel for this type"),
    };
    Ok((address, sync))
}

/// Launches `name` with the addresses of `tensors` (zero for none), then `numbers`.
///
/// The caller vouches for what no signature can check: that the kernel's parameters are these, in this order, and that the
/// extents among `numbers` describe the tensors.
pub(super) fn launch(
    name: &str,
    grid: Grid,
    tensors: &[Option<&Tensor>],
    numbers: &[Number],
) -> Result<()> {
    let Some(first) = tensors.iter().flatten().next() else {
        bail!("{name} has no tensors")
    };
    let device = device(first)?;
    let function = device.get_or_load_custom_func(name, "defend-nn", KERNELS)?;
    let stream = device.cuda_stream();
    let storages: Vec<_> = tensors
        .iter()
        .map(|t| t.map(Tensor::storage_and_layout))
        .collect();
    let (mut addresses, mut syncs) = (Vec::new(), Vec::new());
    for storage in &storages {
        let Some((storage, layout)) = storage else {
            addresses.push(0u64);
            continue;
        };
        let Storage::Cuda(storage) = &**storage else {
            bail!("{name} met a tensor of another device")
        };
        if storage.device.location() != device.location() {
            bail!("{name} met tensors of two CUDA devices")
        }
        let (address, sync) = address(storage, layout, &stream)?;
        if address % 16 != 0 {
            bail!("{name} met a tensor that does not begin at a multiple of 16 bytes")
        }
        addresses.push(address);
        syncs.push(sync);
    }
    let narrowed: Vec<(i32, f32)> = numbers
        .iter()
        .map(|number| match *number {
            Number::Int(value) => i32::try_from(value).map(|value| (value, 0.0)),
            Number::Count(value) => u32::try_from(value).map(|value| (value.cast_signed(), 0.0)),
            Number::Float(value) => Ok((0, value as f32)),
        })
        .collect::<std::result::Result<_, _>>()
        .map_err(candle_core::Error::wrap)?;
    let mut arguments = stream.launch_builder(&function);
    for address in &addresses {
        arguments.arg(address);
    }
    for (number, (int, float)) in numbers.iter().zip(&narrowed) {
        match number {
            Number::Int(_) | Number::Count(_) => arguments.arg(int),
            Number::Float(_) => arguments.arg(float),
        };
    }
    let config = LaunchConfig {
        grid_dim: (grid.blocks[0] as u32, grid.blocks[1] as u32, 1),
        block_dim: (grid.threads[0], grid.threads[1], 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: every pointer is the start of a contiguous tensor of this device that lives until after the launch, and
    // memory is freed in the order of the stream of the thread that drops it last: as with all of candle's kernels, a program
    // that hands tensors to other threads waits for the device first. The callers, all in this crate, pass the extents
    // that they made the outputs with, for operands that the operations of `defend-nn` has checked. Tensors that a kernel writes to are either
    // fresh, with no other user, or variables, whose contents may change.
    unsafe { arguments.launch(config) }.w()?;
    Ok(())
}

/// Address of a tensor's values for a kernel that finds its tensors in a table; they must outlive its launch.
pub(super) fn address_of(t: &Tensor) -> Result<u64> {
    let stream = device(t)?.cuda_stream();
    let (storage, layout) = t.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        bail!("a CUDA kernel met a tensor of another device")
    };
    let (address, _sync) = address(storage, layout, &stream)?;
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without them everything would still be right, and slower.
    #[test]
    fn newer_processors_have_the_fused_attention() {
        let target = KERNELS.split(".target sm_").nth(1).unwrap();
        let digits: String = target.chars().take_while(char::is_ascii_digit).collect();
        let newer = digits.parse::<u32>().unwrap() >= 80;
        for name in [
            "attend_bf16",
            "attend_f16",
            "cls_attention_bf16",
            "cls_attention_f16",
        ] {
            assert_eq!(has_kernel(name), newer, "{name} for sm_{digits}");
        }
    }
}
