//! Vectorisable scalar functions and reductions.
//!
//! Every function is branch-free and uses plain multiplications and additions (no fused
//! multiply-add), so the compiler turns the loops into AVX2 or AVX-512 code under
//! [`pulp::Arch::dispatch`] and the results do not depend on which of them runs.

use std::array::from_fn;

use super::square::{self, SIDE, Square};

/// Number of partial sums in a reduction: two AVX-512 registers, as one addition waits for the other.
const LANES: usize = 32;

/// Runs `body` compiled for the widest vector unit that this processor has. Only what is inlined is compiled so:
/// [`crate::vectorised`] sees to that.
#[inline(always)]
pub fn dispatch<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}

/// Runs a closure, `vectorised!(|| ...)`, compiled for the widest vector unit that this processor has.
///
/// A macro because the closure must be inlined where its instructions are chosen: the compiler leaves a long one outside,
/// where it may use nothing but what every processor has.
#[macro_export]
macro_rules! vectorised {
    (|| $body:expr) => {
        $crate::vector::dispatch(
            #[inline(always)]
            || $body,
        )
    };
}

/// e^x, relative error below 2e-7 on `-87..=88`; smaller inputs give 0 to within 1e-38.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_2e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_6e-1;
    p = p * r + 0.5;
    p = p * r * r + r + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    p * power
}

/// The error function, absolute error below 4e-7 (rational minimax approximation on `-4..=4`).
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let s = x * x;
    let mut p = -2.726_142_3e-10;
    p = p * s + 2.770_681_4e-8;
    p = p * s - 2.101_024e-6;
    p = p * s - 5.692_506_6e-5;
    p = p * s - 7.349_906_5e-4;
    p = p * s - 2.954_6e-3;
    p = p * s - 1.609_603_3e-2;
    let mut q = -1.456_607_2e-5;
    q = q * s - 2.133_740_6e-4;
    q = q * s - 1.682_827e-3;
    q = q * s - 7.373_329_3e-3;
    q = q * s - 1.426_473_9e-2;
    x * p / q
}

/// Exact (erf) GELU: `x Φ(x)`.
#[inline(always)]
pub fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// [`gelu`] and its derivative, `Φ(x) + x φ(x)`.
#[inline(always)]
pub fn gelu_and_derivative(x: f32) -> (f32, f32) {
    const FRAC_1_SQRT_2PI: f32 = 0.398_942_3;
    let cdf = 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
    (x * cdf, cdf + x * FRAC_1_SQRT_2PI * exp(-0.5 * x * x))
}

/// Sums a function of the elements of slices of equal length: [`LANES`] partial sums, then those in pairs.
#[inline(always)]
fn reduce<const N: usize>(slices: [&[f32]; N], term: impl Fn([f32; N]) -> f32) -> f32 {
    let len = slices[0].len();
    let slices = slices.map(|x| x[..len].as_chunks::<LANES>());
    let mut lanes = [0f32; LANES];
    for i in 0..len / LANES {
        let chunks = slices.map(|(chunks, _)| &chunks[i]);
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(chunks.map(|chunk| chunk[lane]));
        }
    }
    let tail = (0..len % LANES).map(|i| term(slices.map(|(_, tail)| tail[i])));
    let tail: f32 = tail.sum();
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[half + i];
        }
        half /= 2;
    }
    lanes[0] + tail
}

/// Sum of `x`.
#[inline(always)]
pub fn sum(x: &[f32]) -> f32 {
    reduce([x], |[x]| x)
}

/// Inner product of two slices of equal length.
#[inline(always)]
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    reduce([x, y], |[x, y]| x * y)
}

/// Sum of squared differences to `centre`.
#[inline(always)]
pub fn squared_deviation(x: &[f32], centre: f32) -> f32 {
    reduce([x], |[x]| (x - centre) * (x - centre))
}

/// Largest value of `x`.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut chunks = x.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = if v > *lane { v } else { *lane };
        }
    }
    let tail = chunks.remainder();
    let all = lanes.iter().chain(tail);
    all.fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
}

/// Calls a function for columns of this width: a block's, two vectors of the processor.
macro_rules! of_width {
    ($width:expr, $function:ident($($argument:expr),*)) => {
        match $width {
            32 => $function::<32>($($argument),*),
            16 => $function::<16>($($argument),*),
            8 => $function::<8>($($argument),*),
            4 => $function::<4>($($argument),*),
            2 => $function::<2>($($argument),*),
            width => unreachable!("a block of {width} columns"),
        }
    };
}

/// Writes up to W rows of W values as the columns of `out`, `[lines, W]`; columns without a row become zeros.
#[inline(always)]
pub fn transpose(out: &mut [f32], rows: &[f32], width: usize) {
    #[inline(always)]
    fn of<const W: usize>(out: &mut [f32], rows: &[f32]) {
        let (out, rows) = (out.as_chunks_mut::<W>().0, rows.as_chunks::<W>().0);
        // Squares of four are transposed in registers.
        let squares = if W.is_multiple_of(SIDE) {
            rows.as_chunks::<SIDE>().0
        } else {
            &[]
        };
        let (fours, _) = out.as_chunks_mut::<SIDE>();
        let by_squares = fours.len() * SIDE;
        for (i, rows) in squares.iter().enumerate() {
            for (j, lines) in fours.iter_mut().enumerate() {
                let square: Square = from_fn(|r| from_fn(|c| rows[r][SIDE * j + c]));
                for (line, column) in lines.iter_mut().zip(square::transpose(square)) {
                    line[SIDE * i..][..SIDE].copy_from_slice(&column);
                }
            }
        }
        let done = squares.len() * SIDE;
        for (i, row) in rows.iter().enumerate() {
            // What is left of both.
            let from = if i < done { by_squares } else { 0 };
            for (line, value) in out.iter_mut().zip(row).skip(from) {
                line[i] = *value;
            }
        }
        for line in out {
            line[rows.len()..].fill(0.0);
        }
    }
    of_width!(width, of(out, rows));
}

/// Replaces the values of a block `[rows, W]` by `exp(x - m)` with the largest m of each column; what makes probabilities of
/// them, the inverse sums of the columns, goes to `factors` `[W]`.
#[inline(always)]
pub fn exp_columns(block: &mut [f32], factors: &mut [f32]) {
    #[inline(always)]
    fn of<const W: usize>(block: &mut [f32], factors: &mut [f32]) {
        let (lines, _) = block.as_chunks_mut::<W>();
        let mut top = [f32::NEG_INFINITY; W];
        for line in lines.iter() {
            for (top, &v) in top.iter_mut().zip(line) {
                *top = if v > *top { v } else { *top };
            }
        }
        let mut totals = [0f32; W];
        for line in lines {
            for ((v, top), total) in line.iter_mut().zip(&top).zip(&mut totals) {
                *v = exp(*v - top);
                *total += *v;
            }
        }
        factors.copy_from_slice(&totals.map(|total| 1.0 / total));
    }
    of_width!(factors.len(), of(block, factors));
}

/// Makes probabilities of the values `p` `[rows, W]` by the `factors` `[W]` of [`exp_columns`], and of the gradient `g` `[rows, W]` of
/// these probabilities that of their logits: `p (g - sum(p g))`.
#[inline(always)]
pub fn softmax_columns_backward(p: &mut [f32], g: &mut [f32], factors: &[f32]) {
    #[inline(always)]
    fn of<const W: usize>(p: &mut [f32], g: &mut [f32], factors: &[f32]) {
        let ((p, _), (g, _)) = (p.as_chunks_mut::<W>(), g.as_chunks_mut::<W>());
        let factors: [f32; W] = from_fn(|i| factors[i]);
        let mut means = [0f32; W];
        for (p, g) in p.iter_mut().zip(g.iter()) {
            for (((mean, p), g), factor) in means.iter_mut().zip(p).zip(g).zip(&factors) {
                *p *= factor;
                *mean += *p * g;
            }
        }
        for (p, g) in p.iter().zip(g) {
            for ((g, p), mean) in g.iter_mut().zip(p).zip(&means) {
                *g = p * (*g - mean);
            }
        }
    }
    of_width!(factors.len(), of(p, g, factors));
}

/// Sums of the first columns of a block `[rows, W]`, as many as `sums` holds.
#[inline(always)]
pub fn column_sums(sums: &mut [f32], block: &[f32], width: usize) {
    #[inline(always)]
    fn of<const W: usize>(sums: &mut [f32], block: &[f32]) {
        let mut all = [0f32; W];
        for line in block.as_chunks::<W>().0 {
            all.iter_mut().zip(line).for_each(|(sum, v)| *sum += v);
        }
        sums.copy_from_slice(&all[..sums.len()]);
    }
    of_width!(width, of(sums, block));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without pulp's feature for it, AVX2 processors would quietly run the loops four numbers at a time.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn avx2_is_used_where_there_is_avx2() {
        if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
            assert!(!matches!(pulp::Arch::new(), pulp::Arch::Scalar));
        }
    }

    #[test]
    fn exp_is_accurate_over_its_range() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let want = f64::from(x).exp();
            let error = (f64::from(exp(x)) - want).abs() / want;
            assert!(error < 2e-7, "exp({x}) has relative error {error}");
        }
        assert!(exp(-1000.0) < 1e-37);
    }

    #[test]
    fn erf_matches_a_series_in_double_precision() {
        // erf(x) = 2/sqrt(pi) * sum (-1)^n x^(2n+1) / (n! (2n+1))
        let series = |x: f64| {
            let (mut term, mut total) = (x, x);
            for n in 1..200 {
                term *= -x * x / f64::from(n);
                total += term / f64::from(2 * n + 1);
            }
            total * 2.0 / std::f64::consts::PI.sqrt()
        };
        for i in -380..=380 {
            let x = f64::from(i) / 100.0;
            let error = (f64::from(erf(x as f32)) - series(x)).abs();
            assert!(error < 4e-7, "erf({x}) is off by {error}");
        }
        assert!((erf(30.0) - 1.0).abs() < 1e-6);
    }

    #[test]
    fn reductions_cover_tails() {
        let x: Vec<f32> = (0..37).map(|i| i as f32).collect();
        assert_eq!(sum(&x), 666.0);
        assert_eq!(dot(&x, &x), 16206.0);
        let y: Vec<f32> = (0..70).map(|i| 1.0 / (1.0 + i as f32)).collect();
        let terms = x.iter().zip(&y).map(|(a, b)| f64::from(a * b));
        assert!((f64::from(dot(&x, &y)) - terms.sum::<f64>()).abs() < 1e-5);
        assert_eq!(squared_deviation(&x, 18.0), 4218.0);
        assert_eq!(max(&x), 36.0);
        assert_eq!(squared_deviation(&[1.0, 3.0], 2.0), 2.0);
    }

    #[test]
    fn exponentials_of_extreme_logits_are_finite() {
        let mut block = [-1e4, 3.0, 0.0, 3.0, 1e4, 3.0];
        let mut factors = [0.0; 2];
        exp_columns(&mut block, &mut factors);
        assert!(block[4] == 1.0 && block[0] < 1e-30 && block[2] < 1e-30);
        assert_eq!((block[1], factors[1]), (1.0, 1.0 / 3.0));
    }

    #[test]
    fn rows_become_columns() {
        for width in [2, 4, 8, 16, 32] {
            for (lines, rows) in [(width, width), (width, width - 1), (width / 2 + 1, 1)] {
                let values: Vec<f32> = (1..=rows * width).map(|i| i as f32).collect();
                let mut out = vec![f32::NAN; lines * width];
                transpose(&mut out, &values, width);
                for (i, found) in out.iter().enumerate() {
                    let (line, row) = (i / width, i % width);
                    let expected = if row < rows {
                        values[row * width + line]
                    } else {
                        0.0
                    };
                    assert_eq!(*found, expected, "{width}: {line}, {row}");
                }
            }
        }
    }
}
