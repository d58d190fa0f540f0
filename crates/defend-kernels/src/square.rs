//! Squares of four values a side, transposed in registers.

/// Rows and columns.
pub(super) const SIDE: usize = 4;

pub(super) type Square = [[f32; SIDE]; SIDE];

/// The columns as rows. On x86 by the processor's own instructions: with AVX-512 the compiler takes the plain form through memory.
#[inline(always)]
pub(super) fn transpose(rows: Square) -> Square {
    #[cfg(target_arch = "x86_64")]
    {
        use pulp::bytemuck::cast;
        use std::arch::x86_64::{_mm_movehl_ps, _mm_movelh_ps, _mm_unpackhi_ps, _mm_unpacklo_ps};
        let [a, b, c, d] = rows.map(cast);
        // SAFETY: part of SSE, which every x86-64 processor has.
        let columns = unsafe {
            let [low, high] = [_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b)];
            let [next_low, next_high] = [_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d)];
            [
                _mm_movelh_ps(low, next_low),
                _mm_movehl_ps(next_low, low),
                _mm_movelh_ps(high, next_high),
                _mm_movehl_ps(next_high, high),
            ]
        };
        columns.map(cast)
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::array::from_fn(|c| std::array::from_fn(|r| rows[r][c]))
}
