//! Products of pairs of values by the instruction of AVX-512 BF16.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps, _mm512_set1_epi32,
    _mm512_setzero_ps,
};

use pulp::x86::V4;
use pulp::{Simd, f32x16, u32x16};

use super::super::gemm::Product;
use super::super::microkernel::{Epilogue, UNROLL, every_height};
use super::super::panel_layout::VECTORS;
use super::super::processor::PairProcessor;
use super::super::rounding::rounded_pair;

/// Pairs of columns that a tile's loop takes at a time.
const PAIRS: usize = UNROLL / 2;
/// Values of a vector.
const LANES: usize = 16;

pub(crate) fn run(processor: PairProcessor, product: Product<'_, '_, '_>) {
    // SAFETY: `detect`, which alone makes a `PairProcessor`, found all features that the function asks for.
    unsafe { by_pairs(processor.v4, product) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16")]
fn by_pairs(v4: V4, product: Product<'_, '_, '_>) {
    product.by_tiles_of_values::<V4>(
        |tiles| round_to_pairs(tiles),
        |x, rows, panel, add, out| {
            let x: &[u32] = pulp::bytemuck::cast_slice(x);
            let (panel, _) = V4::as_simd_u32s(pulp::bytemuck::cast_slice(panel));
            multiply(v4, x, rows, panel, add, out);
        },
    );
}

/// Rounds values to `bf16`; all of them are in the first half afterwards.
#[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16")]
fn round_to_pairs(values: &mut [f32]) {
    let whole = values.len() / (2 * LANES);
    for i in 0..whole {
        let (vectors, _) = V4::as_simd_f32s(&values[2 * LANES * i..][..2 * LANES]);
        let pairs = pairs_of([vectors[0], vectors[1]]);
        V4::as_mut_simd_f32s(&mut values[LANES * i..][..LANES]).0[0] = pairs;
    }
    for i in LANES * whole..values.len() / 2 {
        values[i] = f32::from_bits(rounded_pair(values[2 * i], values[2 * i + 1]));
    }
}

/// 32 values rounded to `bf16`, in order.
#[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16")]
pub(super) fn pairs_of([low, high]: [f32x16; 2]) -> f32x16 {
    _mm512_cvtne2ps_pbh(high.bits(), low.bits()).bits()
}

/// The same 64 bytes as another vector. `pulp::cast` knows no pairs, and goes through memory.
trait As<T> {
    fn bits(self) -> T;
}

macro_rules! same_bits {
    ($($from:ty => $to:ty),*) => {$(
        impl As<$to> for $from {
            #[inline(always)]
            fn bits(self) -> $to {
                // SAFETY: both are vectors of 64 bytes, and any bits are a value of either.
                unsafe { std::mem::transmute(self) }
            }
        }
    )*};
}

same_bits!(u32x16 => __m512bh, __m512i => __m512bh, __m512bh => f32x16, f32x16 => __m512, __m512 => f32x16);

macro_rules! tiles {
    ($($height:literal $by_row:ident $by_column:ident: $($i:literal $x:ident $low:ident $high:ident),*;)*) => {
        /// A few rows, `[depth / UNROLL, rows, UNROLL]` in pairs, times a part of a panel.
        #[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16")]
        fn multiply(v4: V4, x: &[u32], rows: usize, panel: &[u32x16], add: Epilogue<'_>, out: &mut [f32]) {
            match rows {
                $($height => $by_row(v4, x, panel, add, out),)*
                _ => unreachable!("a tile of {rows} rows"),
            }
        }

        $(
            #[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16")]
            fn $by_row(v4: V4, x: &[u32], panel: &[u32x16], add: Epilogue<'_>, out: &mut [f32]) {
                $(
                    let mut $low = _mm512_setzero_ps();
                    let mut $high = _mm512_setzero_ps();
                )*
                let (x, _) = x.as_chunks::<{ PAIRS * $height }>();
                let (panel, _) = panel.as_chunks::<{ PAIRS * VECTORS }>();
                for (values, lines) in x.iter().zip(panel) {
                    for k in 0..PAIRS {
                        let (low, high) = (lines[VECTORS * k].bits(), lines[VECTORS * k + 1].bits());
                        $(
                            let value = _mm512_set1_epi32(values[$i * PAIRS + k].cast_signed()).bits();
                            $low = _mm512_dpbf16_ps($low, value, low);
                            $high = _mm512_dpbf16_ps($high, value, high);
                        )*
                    }
                }
                add.add(v4, out, [$([$low.bits(), $high.bits()]),*]);
            }
        )*
    };
}

every_height!(tiles);
