//! Products whose sides are rounded to `bf16` and summed in `f32`: for frozen weights, where a processor with AMX or AVX-512
//! BF16 multiplies more of them at a time.
//!
//! Elsewhere both sides are rounded as well and multiplied as `f32`: a product is the same to within the order of its sum. From
//! product to product more values fall on the other side of a rounding, so that networks differ by a part of what the rounding does.

use super::blocked::Columns;
use super::packed::UNROLL;
use super::pool::Buffer;

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod pairs;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[allow(unsafe_code)]
mod tiles;

/// How a matrix in panels is multiplied.
#[derive(Debug, Clone, Copy)]
pub enum Form {
    /// As `f32`, `[blocks, depth, W]`.
    Single,
    /// The same, with both sides rounded to `bf16`.
    Rounded,
    /// As `bf16`, pairs of rows side by side: `[blocks, depth / 2, W, 2]`.
    Pairs(pairs::Processor),
    /// In the same form, whole tiles at a time.
    Tiles(tiles::Processor),
}

impl Form {
    /// The fastest way on this processor to multiply rounded values, if the left side is cut so.
    pub fn rounded(depth: Columns) -> Self {
        // What the left side is laid out in consists of whole groups of columns.
        let fits = |group| (0..depth.blocks()).all(|i| depth.block(i).1.is_multiple_of(group));
        if let Some(processor) = tiles::Processor::detect().filter(|_| fits(tiles::DEPTH)) {
            return Self::Tiles(processor);
        }
        let processor = pairs::Processor::detect().filter(|_| fits(UNROLL));
        processor.map_or(Self::Rounded, Self::Pairs)
    }

    /// Rows of the matrix that lie side by side in a line of a panel.
    #[inline(always)]
    pub(super) fn rows_in_a_line(self) -> usize {
        match self {
            Self::Single | Self::Rounded => 1,
            Self::Pairs(_) | Self::Tiles(_) => 2,
        }
    }

    /// Brings panels of `f32`, `[blocks, depth, W]`, into this form.
    pub fn convert(self, mut panels: Buffer, width: usize) -> Buffer {
        match self {
            Self::Single => panels,
            Self::Rounded => {
                round(&mut panels);
                panels
            }
            Self::Pairs(_) | Self::Tiles(_) => {
                let mut out = Buffer::stale(panels.len() / 2);
                let values: &mut [u32] = pulp::bytemuck::cast_slice_mut(&mut out);
                let lines = values.chunks_exact_mut(width);
                for (line, rows) in lines.zip(panels.chunks_exact(2 * width)) {
                    let (even, odd) = rows.split_at(width);
                    for ((pair, even), odd) in line.iter_mut().zip(even).zip(odd) {
                        *pair = rounded_pair(*even, *odd);
                    }
                }
                out
            }
        }
    }
}

/// The nearest `bf16`, of two the even one, as the bits of an `f32`; NaN stays NaN.
#[inline(always)]
fn nearest(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let kept = if x.is_nan() {
        bits | 0x0040_0000
    } else {
        rounded
    };
    kept & 0xffff_0000
}

/// Two values as `bf16`, the first in the low half.
#[inline(always)]
fn rounded_pair(even: f32, odd: f32) -> u32 {
    nearest(even) >> 16 | nearest(odd)
}

/// Rounds to `bf16` in place.
#[inline(always)]
pub fn round(values: &mut [f32]) {
    for value in values {
        *value = f32::from_bits(nearest(*value));
    }
}

/// A processor that there is none of.
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod nowhere {
    #[derive(Debug, Clone, Copy)]
    pub enum Processor {}

    impl Processor {
        pub(super) fn detect() -> Option<Self> {
            None
        }

        pub(crate) fn run(self, _: super::super::packed::Product<'_, '_, '_>) {
            match self {}
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
use nowhere as pairs;

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod tiles {
    pub use super::nowhere::Processor;

    pub(super) const DEPTH: usize = 32;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_value_is_taken_and_of_two_the_even_one() {
        let near = |x: f32| f32::from_bits(nearest(x));
        // Steps of bf16 are 1/128 from 1 on.
        let step = 1.0 / 128.0;
        assert_eq!(near(1.0 + 0.49 * step), 1.0);
        assert_eq!(near(1.0 + 0.5 * step), 1.0);
        assert_eq!(near(1.0 + 1.5 * step), 1.0 + 2.0 * step);
        assert_eq!(near(-(1.0 + 0.51 * step)), -(1.0 + step));
        assert_eq!(near(0.0), 0.0);
        assert_eq!(near(f32::INFINITY), f32::INFINITY);
        assert_eq!(near(f32::MAX), f32::INFINITY);
        // Bits that rounding would carry into the sign.
        assert!(near(f32::from_bits(0x7fff_ffff)).is_nan());
        assert!(near(f32::NAN).is_nan());
    }
}
