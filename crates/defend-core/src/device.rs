//! Where to compute.

use std::sync::OnceLock;

use candle_core::Device;

/// The best device that this build and this machine have: CUDA, then Metal, then the CPU. The same at every call.
///
/// Builds without the `cuda` and `metal` features always answer CPU.
pub fn best_device() -> Device {
    // Two devices made of one card have handles and kernels of their own, and on Metal their tensors do not mix.
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let found = DEVICE.get_or_init(|| {
        let gpu = if candle_core::utils::cuda_is_available() {
            Device::new_cuda(0).ok()
        } else if candle_core::utils::metal_is_available() {
            Device::new_metal(0).ok()
        } else {
            None
        };
        // A build for CUDA on a machine without a card still works.
        gpu.unwrap_or(Device::Cpu)
    });
    found.clone()
}
