//! Rounding to `bf16`.

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
pub(super) fn rounded_pair(even: f32, odd: f32) -> u32 {
    nearest(even) >> 16 | nearest(odd)
}

/// Rounds to `bf16` in place.
#[inline(always)]
pub fn round(values: &mut [f32]) {
    for value in values {
        *value = f32::from_bits(nearest(*value));
    }
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
