//! Where to compute.

use candle_core::Device;

/// The best device that this build and this machine have: CUDA, then Metal, then the CPU.
///
/// Builds without the `cuda` and `metal` features always answer CPU.
pub fn best_device() -> Device {
    let gpu = if candle_core::utils::cuda_is_available() {
        Device::new_cuda(0).ok()
    } else if candle_core::utils::metal_is_available() {
        Device::new_metal(0).ok()
    } else {
        None
    };
    // A build for CUDA on a machine without a card still works.
    gpu.unwrap_or(Device::Cpu)
}
