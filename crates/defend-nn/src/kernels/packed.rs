//! Products with a matrix that is laid out once for many rows.
//!
//! `gemm` lays both operands of every product out anew. A weight matrix meets each piece of each image, so here it is
//! laid out once a call, or once for good where it is frozen; the rows are read where they are.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// Vectors side by side in a panel: with [`TILE_ROWS`] rows their products fill the registers of AVX2.
const PANEL_VECTORS: usize = 2;
/// Rows that a tile handles at most, with 16 registers and with 32.
const TILE_ROWS: [usize; 2] = [6, 12];
/// Bytes of a panel that are handled in one go: with the rows' parts they stay in the nearest cache.
const PANEL_BYTES: usize = 24 * 1024;

/// A matrix of `depth` rows and `columns` columns as panels of a few columns each, `[panels, depth, panel width]`,
/// filled up with zeros.
#[derive(Debug)]
pub(crate) struct Packed {
    values: Vec<f32>,
    depth: usize,
    columns: usize,
}

impl Packed {
    /// From a matrix `[depth, columns]`, row-major.
    pub(crate) fn new(matrix: &[f32], depth: usize, columns: usize) -> Self {
        Self::of(matrix, depth, columns, |panel, first, width| {
            let rows = matrix.chunks_exact(columns);
            for (line, row) in panel.chunks_exact_mut(panel_width()).zip(rows) {
                line[..width].copy_from_slice(&row[first..first + width]);
            }
        })
    }

    /// From the transpose `[columns, depth]`, row-major, as the weights of an affine map are kept.
    pub(crate) fn transposed(matrix: &[f32], depth: usize, columns: usize) -> Self {
        Self::of(matrix, depth, columns, |panel, first, width| {
            let rows = matrix[first * depth..].chunks_exact(depth).take(width);
            for (column, row) in rows.enumerate() {
                let targets = panel[column..].iter_mut().step_by(panel_width());
                targets
                    .zip(row)
                    .for_each(|(target, value)| *target = *value);
            }
        })
    }

    fn of(
        matrix: &[f32],
        depth: usize,
        columns: usize,
        fill: impl Fn(&mut [f32], usize, usize) + Sync,
    ) -> Self {
        assert_eq!(matrix.len(), depth * columns);
        let panel = panel_width();
        let mut values = vec![0f32; columns.div_ceil(panel) * panel * depth];
        let panels = values.par_chunks_exact_mut(panel * depth);
        panels.enumerate().for_each(|(i, values)| {
            fill(values, i * panel, panel.min(columns - i * panel));
        });
        Self {
            values,
            depth,
            columns,
        }
    }
}

/// Columns of a panel on this processor.
fn panel_width() -> usize {
    struct Width;
    impl WithSimd for Width {
        type Output = usize;
        fn with_simd<S: Simd>(self, _: S) -> usize {
            PANEL_VECTORS * S::F32_LANES
        }
    }
    pulp::Arch::new().dispatch(Width)
}

/// What the product is added to.
#[derive(Clone, Copy)]
pub(crate) enum Start<'a> {
    /// The destination's old content.
    Kept,
    /// Nothing.
    Zero,
    /// This row, in every row.
    Bias(&'a [f32]),
}

/// `out = start + factor x M` for the rows of `x`: `out` `[rows, columns]`, `x` `[rows, depth]`.
///
/// A row's result depends on no other row.
pub(crate) fn product(out: &mut [f32], start: Start<'_>, x: &[f32], matrix: &Packed, factor: f32) {
    let rows = out.len() / matrix.columns;
    assert_eq!(out.len(), rows * matrix.columns);
    assert_eq!(x.len(), rows * matrix.depth);
    if let Start::Bias(bias) = start {
        assert_eq!(bias.len(), matrix.columns);
    }
    pulp::Arch::new().dispatch(Product {
        out,
        start,
        x,
        rows,
        matrix,
        factor,
    });
}

struct Product<'a> {
    out: &'a mut [f32],
    start: Start<'a>,
    x: &'a [f32],
    rows: usize,
    matrix: &'a Packed,
    factor: f32,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (depth, columns) = (self.matrix.depth, self.matrix.columns);
        let width = PANEL_VECTORS * S::F32_LANES;
        // Tiles of nearly equal heights: a last one of a row or two would leave the multipliers idle.
        let tile_rows = TILE_ROWS[usize::from(S::REGISTER_COUNT >= 32)];
        let tiles = self.rows.div_ceil(tile_rows);
        let mut from = 0;
        while from < depth {
            let part = (PANEL_BYTES / (4 * width)).min(depth - from);
            let panels = self.matrix.values.chunks_exact(depth * width);
            for (i, panel) in panels.enumerate() {
                let (panel, _) = S::as_simd_f32s(&panel[from * width..][..part * width]);
                let width = width.min(columns - i * width);
                let first = i * PANEL_VECTORS * S::F32_LANES;
                let start = match self.start {
                    _ if from > 0 => Start::Kept,
                    Start::Bias(bias) => Start::Bias(&bias[first..first + width]),
                    start => start,
                };
                for tile in 0..tiles {
                    let row = tile * self.rows / tiles;
                    let rows = (tile + 1) * self.rows / tiles - row;
                    let tile = Tile {
                        x: &self.x[row * depth + from..],
                        depth,
                        panel,
                        columns,
                        width,
                        start,
                        factor: self.factor,
                    };
                    let out = &mut self.out[row * columns + first..];
                    match rows {
                        1 => tile.one(simd, out),
                        2 => tile.two(simd, out),
                        3 => tile.three(simd, out),
                        4 => tile.four(simd, out),
                        5 => tile.five(simd, out),
                        6 => tile.six(simd, out),
                        7 => tile.seven(simd, out),
                        8 => tile.eight(simd, out),
                        9 => tile.nine(simd, out),
                        10 => tile.ten(simd, out),
                        11 => tile.eleven(simd, out),
                        _ => tile.twelve(simd, out),
                    }
                }
            }
            from += part;
        }
    }
}

/// A few rows times a part of a panel.
struct Tile<'a, S: Simd> {
    /// From the first row's first value on.
    x: &'a [f32],
    /// From one row of `x` to the next.
    depth: usize,
    panel: &'a [S::f32s],
    /// From one row of the result to the next.
    columns: usize,
    /// Columns of the panel that are not filled up.
    width: usize,
    /// For the panel's columns.
    start: Start<'a>,
    factor: f32,
}

/// Tiles of each height: sums in variables of their own, which the compiler keeps in registers as it does not with arrays.
macro_rules! tiles {
    ($($name:ident: $($i:literal $x:ident $low:ident $high:ident),*;)*) => {
        impl<S: Simd> Tile<'_, S> {
            $(
                #[inline(always)]
                fn $name(&self, simd: S, out: &mut [f32]) {
                    let part = self.panel.len() / PANEL_VECTORS;
                    $(
                        let $x = &self.x[$i * self.depth..][..part];
                        let mut $low = simd.splat_f32s(0.0);
                        let mut $high = simd.splat_f32s(0.0);
                    )*
                    for (k, panel) in self.panel.chunks_exact(PANEL_VECTORS).enumerate() {
                        $(
                            let value = simd.splat_f32s($x[k]);
                            $low = simd.mul_add_f32s(value, panel[0], $low);
                            $high = simd.mul_add_f32s(value, panel[1], $high);
                        )*
                    }
                    $(self.add(simd, &mut out[$i * self.columns..], [$low, $high]);)*
                }
            )*
        }
    };
}

tiles! {
    one: 0 x0 a0 b0;
    two: 0 x0 a0 b0, 1 x1 a1 b1;
    three: 0 x0 a0 b0, 1 x1 a1 b1, 2 x2 a2 b2;
    four: 0 x0 a0 b0, 1 x1 a1 b1, 2 x2 a2 b2, 3 x3 a3 b3;
    five: 0 x0 a0 b0, 1 x1 a1 b1, 2 x2 a2 b2, 3 x3 a3 b3, 4 x4 a4 b4;
    six: 0 x0 a0 b0, 1 x1 a1 b1, 2 x2 a2 b2, 3 x3 a3 b3, 4 x4 a4 b4, 5 x5 a5 b5;
    seven: 0 x0 a0 b0, 1 x1 a1 b1, 2 x2 a2 b2, 3 x3 a3 b3, 4 x4 a4 b4, 5 x5 a5 b5, 6 x6 a6 b6;
    eight: 0 x0 a0 b0, 1 x1 a1 b1, 2 x2 a2 b2, 3 x3 a3 b3, 4 x4 a4 b4, 5 x5 a5 b5, 6 x6 a6 b6, 7 x7 a7 b7;
    nine: 0 x0 a0 b0, 1 x1 a1 b1, 2 x2 a2 b2, 3 x3 a3 b3, 4 x4 a4 b4, 5 x5 a5 b5, 6 x6 a6 b6, 7 x7 a7 b7, 8 x8 a8 b8;
    ten: 0 x0 a0 b0, 1 x1 a1 b1, 2 x2 a2 b2, 3 x3 a3 b3, 4 x4 a4 b4, 5 x5 a5 b5, 6 x6 a6 b6, 7 x7 a7 b7, 8 x8 a8 b8, 9 x9 a9 b9;
    eleven: 0 x0 a0 b0, 1 x1 a1 b1, 2 x2 a2 b2, 3 x3 a3 b3, 4 x4 a4 b4, 5 x5 a5 b5, 6 x6 a6 b6, 7 x7 a7 b7, 8 x8 a8 b8, 9 x9 a9 b9, 10 x10 a10 b10;
    twelve: 0 x0 a0 b0, 1 x1 a1 b1, 2 x2 a2 b2, 3 x3 a3 b3, 4 x4 a4 b4, 5 x5 a5 b5, 6 x6 a6 b6, 7 x7 a7 b7, 8 x8 a8 b8, 9 x9 a9 b9, 10 x10 a10 b10, 11 x11 a11 b11;
}

impl<S: Simd> Tile<'_, S> {
    /// Adds a row's sums to what it starts with.
    #[inline(always)]
    fn add(&self, simd: S, out: &mut [f32], sums: [S::f32s; PANEL_VECTORS]) {
        let out = &mut out[..self.width];
        let factor = simd.splat_f32s(self.factor);
        let zeros = [simd.splat_f32s(0.0); PANEL_VECTORS];
        let start = match self.start {
            Start::Kept => Some(&*out),
            Start::Zero => None,
            Start::Bias(bias) => Some(&bias[..self.width]),
        };
        if self.width == PANEL_VECTORS * S::F32_LANES {
            let start = start.map_or(zeros, |start| {
                let (start, _) = S::as_simd_f32s(start);
                [start[0], start[1]]
            });
            let (out, _) = S::as_mut_simd_f32s(out);
            for ((out, start), sum) in out.iter_mut().zip(start).zip(sums) {
                *out = simd.mul_add_f32s(factor, sum, start);
            }
        } else {
            // The same on a padded copy.
            let mut padded = zeros;
            let values: &mut [f32] = pulp::bytemuck::cast_slice_mut(&mut padded);
            if let Some(start) = start {
                values[..self.width].copy_from_slice(start);
            }
            for (padded, sum) in padded.iter_mut().zip(sums) {
                *padded = simd.mul_add_f32s(factor, sum, *padded);
            }
            let values: &[f32] = pulp::bytemuck::cast_slice(&padded);
            out.copy_from_slice(&values[..self.width]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize, step: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * step).sin()).collect()
    }

    #[test]
    fn products_of_every_height_and_odd_widths_match_loops() {
        for (rows, depth, columns) in [
            (1, 5, 3),
            (2, 400, 16),
            (3, 7, 33),
            (4, 16, 31),
            (5, 800, 17),
            (6, 384, 64),
            (13, 385, 40),
        ] {
            let (x, m) = (noise(rows * depth, 0.37), noise(depth * columns, 0.73));
            let transpose: Vec<f32> = (0..columns * depth)
                .map(|i| m[i % depth * columns + i / depth])
                .collect();
            let start = noise(rows * columns, 0.11);
            let [mut a, mut b] = [start.clone(), start.clone()];
            product(
                &mut a,
                Start::Kept,
                &x,
                &Packed::new(&m, depth, columns),
                0.5,
            );
            let transposed = Packed::transposed(&transpose, depth, columns);
            product(&mut b, Start::Kept, &x, &transposed, 0.5);
            assert_eq!(a, b);
            for (i, (found, start)) in a.iter().zip(&start).enumerate() {
                let (r, c) = (i / columns, i % columns);
                let terms =
                    (0..depth).map(|k| f64::from(x[r * depth + k]) * f64::from(m[k * columns + c]));
                let expected = f64::from(*start) + 0.5 * terms.sum::<f64>();
                assert!(
                    (f64::from(*found) - expected).abs() < 1e-4,
                    "{rows} {depth} {columns} at {i}"
                );
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() {
        let (x, m) = (noise(11 * 50, 0.37), noise(50 * 20, 0.73));
        let m = Packed::new(&m, 50, 20);
        let bias = noise(20, 0.2);
        let mut all = vec![0.0; 11 * 20];
        product(&mut all, Start::Bias(&bias), &x, &m, 1.0);
        for row in 0..11 {
            let mut one = vec![0.0; 20];
            product(&mut one, Start::Bias(&bias), &x[row * 50..][..50], &m, 1.0);
            assert_eq!(one, all[row * 20..][..20]);
            let mut bare = vec![7.0; 20];
            product(&mut bare, Start::Zero, &x[row * 50..][..50], &m, 1.0);
            let pairs = one.iter().zip(&bare).zip(&bias);
            assert!(
                pairs
                    .into_iter()
                    .all(|((one, bare), bias)| (one - bare - bias).abs() < 1e-5)
            );
        }
    }
}
