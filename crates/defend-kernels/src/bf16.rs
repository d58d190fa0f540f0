//! Products whose sides are rounded to `bf16` and summed in `f32`: for frozen weights, where a processor with AMX or AVX-512
//! BF16 multiplies more of them at a time.
//!
//! Elsewhere both sides are rounded as well and multiplied as `f32`: a product is the same to within the order of its sum. From
//! product to product more values fall on the other side of a rounding, so that networks differ by a part of what the rounding does.

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
pub(super) mod pairs;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[allow(unsafe_code)]
pub(super) mod tiles;

/// Products by a processor that there is none of.
#[cfg(not(target_arch = "x86_64"))]
pub(super) mod pairs {
    use crate::gemm::Product;
    use crate::processor::PairProcessor;

    pub(crate) fn run(processor: PairProcessor, _: Product<'_, '_, '_>) {
        match processor {}
    }
}

/// The same.
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub(super) mod tiles {
    use crate::gemm::Product;
    use crate::processor::TileProcessor;

    pub(crate) fn run(processor: TileProcessor, _: Product<'_, '_, '_>) {
        match processor {}
    }
}
