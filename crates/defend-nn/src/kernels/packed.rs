//! Products with a matrix that is laid out once for many rows.
//!
//! `gemm` lays both operands of every product out anew. A weight matrix meets each piece of each image, so here it is
//! laid out once a call, or once for good where it is frozen; the rows are read where they are.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::pool::Buffer;

/// Vectors side by side in a panel: with [`TILE_ROWS`] rows their products fill the registers of AVX2.
const PANEL_VECTORS: usize = 2;
/// Rows that a tile handles at most, with 16 registers and with 32.
const TILE_ROWS: [usize; 2] = [6, 12];
/// Bytes of a panel that are handled in one go: with the rows' parts they stay in the nearest cache.
const PANEL_BYTES: usize = 24 * 1024;

/// Steps of the depth that a tile's loop takes at a time. What is left of a core whose other hardware thread is busy is mostly
/// the number of instructions, and counters and bounds are a third of them in a loop of single steps.
const UNROLL: usize = 4;

/// A matrix of `depth` rows and `columns` columns as panels of `width` columns each, `[panels, depth, width]`, filled up
/// with zeros.
#[derive(Debug)]
pub(crate) struct Packed {
    values: Buffer,
    depth: usize,
    columns: usize,
    width: usize,
}

impl Packed {
    /// From a matrix `[depth, columns]`, row-major.
    pub(crate) fn new(matrix: &[f32], depth: usize, columns: usize) -> Self {
        Self::from_rows(matrix, depth, columns, panel_width())
    }

    /// The same, for the left side of [`transposed_product`].
    pub(crate) fn tiles(matrix: &[f32], depth: usize, columns: usize) -> Self {
        Self::from_rows(matrix, depth, columns, tile_rows())
    }

    fn from_rows(matrix: &[f32], depth: usize, columns: usize, width: usize) -> Self {
        Self::of(matrix, depth, columns, width, |panel, first, filled| {
            let rows = matrix.chunks_exact(columns);
            // Copies of a known length need no call.
            match width {
                6 if filled == 6 => copy::<6>(panel, rows, first),
                12 if filled == 12 => copy::<12>(panel, rows, first),
                16 if filled == 16 => copy::<16>(panel, rows, first),
                32 if filled == 32 => copy::<32>(panel, rows, first),
                _ => {
                    for (line, row) in panel.chunks_exact_mut(width).zip(rows) {
                        line[..filled].copy_from_slice(&row[first..first + filled]);
                    }
                }
            }
        })
    }

    /// From the transpose `[columns, depth]`, row-major, as the weights of an affine map are kept.
    pub(crate) fn transposed(matrix: &[f32], depth: usize, columns: usize) -> Self {
        let width = panel_width();
        Self::of(matrix, depth, columns, width, |panel, first, filled| {
            let rows = matrix[first * depth..].chunks_exact(depth).take(filled);
            for (column, row) in rows.enumerate() {
                let targets = panel[column..].iter_mut().step_by(width);
                targets
                    .zip(row)
                    .for_each(|(target, value)| *target = *value);
            }
        })
    }

    /// Keeps the matrix for more than one pass.
    pub(crate) fn keep(&mut self) {
        self.values.keep();
    }

    fn of(
        matrix: &[f32],
        depth: usize,
        columns: usize,
        width: usize,
        fill: impl Fn(&mut [f32], usize, usize) + Sync,
    ) -> Self {
        assert_eq!(matrix.len(), depth * columns);
        let mut values = Buffer::stale(columns.div_ceil(width) * width * depth);
        let panels = values.par_chunks_exact_mut(width * depth);
        panels.enumerate().for_each(|(i, values)| {
            let filled = width.min(columns - i * width);
            if filled < width {
                values.fill(0.0);
            }
            fill(values, i * width, filled);
        });
        Self {
            values,
            depth,
            columns,
            width,
        }
    }
}

/// Copies columns `first..first + W` of some rows.
fn copy<'a, const W: usize>(
    panel: &mut [f32],
    rows: impl Iterator<Item = &'a [f32]>,
    first: usize,
) {
    for (line, row) in panel.as_chunks_mut::<W>().0.iter_mut().zip(rows) {
        line.copy_from_slice(&row[first..first + W]);
    }
}

/// Columns of a panel and rows of a tile on this processor.
fn extents() -> (usize, usize) {
    struct Extents;
    impl WithSimd for Extents {
        type Output = (usize, usize);
        fn with_simd<S: Simd>(self, _: S) -> (usize, usize) {
            (PANEL_VECTORS * S::F32_LANES, most_rows::<S>())
        }
    }
    pulp::Arch::new().dispatch(Extents)
}

fn panel_width() -> usize {
    extents().0
}

fn tile_rows() -> usize {
    extents().1
}

/// Rows whose sums fit into the registers.
fn most_rows<S: Simd>() -> usize {
    TILE_ROWS[usize::from(S::REGISTER_COUNT >= 32)]
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
        let tiles = self.rows.div_ceil(most_rows::<S>());
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

/// Tiles of each height: sums in variables of their own, which the compiler keeps in registers as it does not with arrays,
/// and [`UNROLL`] steps of the depth at a time.
macro_rules! tiles {
    ($($name:ident: $($i:literal $x:ident $low:ident $high:ident),*;)*) => {
        impl<S: Simd> Tile<'_, S> {
            $(
                #[inline(always)]
                fn $name(&self, simd: S, out: &mut [f32]) {
                    let part = self.panel.len() / PANEL_VECTORS;
                    let (panel, panel_rest) = self.panel.as_chunks::<{ UNROLL * PANEL_VECTORS }>();
                    let steps = panel.len();
                    $(
                        let x = &self.x[$i * self.depth..][..part];
                        // Of a length that the compiler knows to be the loop's.
                        let $x = &x.as_chunks::<UNROLL>().0[..steps];
                        let mut $low = simd.splat_f32s(0.0);
                        let mut $high = simd.splat_f32s(0.0);
                    )*
                    for step in 0..steps {
                        for k in 0..UNROLL {
                            let panel = &panel[step][PANEL_VECTORS * k..];
                            $(
                                let value = simd.splat_f32s($x[step][k]);
                                $low = simd.mul_add_f32s(value, panel[0], $low);
                                $high = simd.mul_add_f32s(value, panel[1], $high);
                            )*
                        }
                    }
                    for (k, panel) in panel_rest.chunks_exact(PANEL_VECTORS).enumerate() {
                        $(
                            let value = simd.splat_f32s(self.x[$i * self.depth + steps * UNROLL + k]);
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
        add(simd, &mut out[..self.width], self.start, self.factor, sums);
    }
}

/// A row's `out = start + factor x sums`, over the columns that a panel has.
#[inline(always)]
fn add<S: Simd>(
    simd: S,
    out: &mut [f32],
    start: Start<'_>,
    factor: f32,
    sums: [S::f32s; PANEL_VECTORS],
) {
    let width = out.len();
    let factor = simd.splat_f32s(factor);
    let zeros = [simd.splat_f32s(0.0); PANEL_VECTORS];
    let start = match start {
        Start::Kept => Some(&*out),
        Start::Zero => None,
        Start::Bias(bias) => Some(&bias[..width]),
    };
    if width == PANEL_VECTORS * S::F32_LANES {
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
            values[..width].copy_from_slice(start);
        }
        for (padded, sum) in padded.iter_mut().zip(sums) {
            *padded = simd.mul_add_f32s(factor, sum, *padded);
        }
        let values: &[f32] = pulp::bytemuck::cast_slice(&padded);
        out.copy_from_slice(&values[..width]);
    }
}

/// Tiles that a task works on at most: their part of the depth stays in the second cache.
const TILES_PER_TASK: usize = 16;

/// `G^T X`, `[G's columns, X's columns]`, with G as [`Packed::tiles`] and X as [`Packed::new`]: the gradient of a map's
/// weights from that of its output and its input.
pub(crate) fn transposed_product(g: &Packed, x: &Packed) -> Vec<f32> {
    assert_eq!((g.depth, g.width), (x.depth, tile_rows()));
    assert_eq!(x.width, panel_width());
    let mut out = vec![0f32; g.columns * x.columns];
    // Enough tasks for all threads; a tile's sums do not depend on its task.
    let tiles = g.columns.div_ceil(g.width);
    let per_task = tiles.div_ceil(2 * rayon::current_num_threads());
    let rows = per_task.clamp(1, TILES_PER_TASK) * g.width;
    let tasks = out.par_chunks_mut(rows * x.columns);
    tasks.enumerate().for_each(|(i, out)| {
        let tiles = &g.values[i * rows * g.depth..];
        pulp::Arch::new().dispatch(TransposedProduct { out, tiles, x });
    });
    out
}

struct TransposedProduct<'a> {
    out: &'a mut [f32],
    /// From the task's first tile on.
    tiles: &'a [f32],
    x: &'a Packed,
}

impl WithSimd for TransposedProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (depth, columns) = (self.x.depth, self.x.columns);
        let (width, height) = (PANEL_VECTORS * S::F32_LANES, most_rows::<S>());
        let rows = self.out.len() / columns;
        let mut from = 0;
        while from < depth {
            let part = (PANEL_BYTES / (4 * width)).min(depth - from);
            let start = if from == 0 { Start::Zero } else { Start::Kept };
            let panels = self.x.values.chunks_exact(depth * width);
            for (i, panel) in panels.enumerate() {
                let (panel, _) = S::as_simd_f32s(&panel[from * width..][..part * width]);
                let first = i * width;
                let width = width.min(columns - first);
                let tiles = self.tiles.chunks_exact(depth * height);
                for (tile, row) in tiles.zip((0..rows).step_by(height)) {
                    let tile = &tile[from * height..][..part * height];
                    let out = &mut self.out[row * columns..];
                    let rows = out.chunks_mut(columns).take(height);
                    let rows = rows.map(|row| &mut row[first..first + width]);
                    if height == TILE_ROWS[0] {
                        let sums = six_by_depth(simd, tile, panel);
                        rows.zip(sums)
                            .for_each(|(out, sums)| add(simd, out, start, 1.0, sums));
                    } else {
                        let sums = twelve_by_depth(simd, tile, panel);
                        rows.zip(sums)
                            .for_each(|(out, sums)| add(simd, out, start, 1.0, sums));
                    }
                }
            }
            from += part;
        }
    }
}

/// Sums over the depth of a tile `[depth, rows]` times a panel, one pair of vectors a row.
macro_rules! by_depth {
    ($name:ident, $rows:literal: $($i:literal $low:ident $high:ident),*) => {
        #[inline(always)]
        fn $name<S: Simd>(simd: S, tile: &[f32], panel: &[S::f32s]) -> [[S::f32s; PANEL_VECTORS]; $rows] {
            $(
                let mut $low = simd.splat_f32s(0.0);
                let mut $high = simd.splat_f32s(0.0);
            )*
            let (lines, lines_rest) = tile.as_chunks::<{ UNROLL * $rows }>();
            let (panel, panel_rest) = panel.as_chunks::<{ UNROLL * PANEL_VECTORS }>();
            for (values, panel) in lines.iter().zip(panel) {
                for k in 0..UNROLL {
                    let (values, panel) = (&values[$rows * k..], &panel[PANEL_VECTORS * k..]);
                    $(
                        let value = simd.splat_f32s(values[$i]);
                        $low = simd.mul_add_f32s(value, panel[0], $low);
                        $high = simd.mul_add_f32s(value, panel[1], $high);
                    )*
                }
            }
            let rest = lines_rest.chunks_exact($rows);
            for (values, panel) in rest.zip(panel_rest.chunks_exact(PANEL_VECTORS)) {
                $(
                    let value = simd.splat_f32s(values[$i]);
                    $low = simd.mul_add_f32s(value, panel[0], $low);
                    $high = simd.mul_add_f32s(value, panel[1], $high);
                )*
            }
            [$([$low, $high]),*]
        }
    };
}

by_depth!(six_by_depth, 6: 0 a0 b0, 1 a1 b1, 2 a2 b2, 3 a3 b3, 4 a4 b4, 5 a5 b5);
by_depth!(
    twelve_by_depth, 12: 0 a0 b0, 1 a1 b1, 2 a2 b2, 3 a3 b3, 4 a4 b4, 5 a5 b5, 6 a6 b6, 7 a7 b7, 8 a8 b8, 9 a9 b9, 10 a10 b10,
    11 a11 b11
);

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
    fn transposed_products_match_loops() {
        for (depth, rows, columns) in [(5, 3, 3), (400, 12, 16), (900, 250, 40), (7, 13, 33)] {
            let (g, x) = (noise(depth * rows, 0.37), noise(depth * columns, 0.73));
            let found = transposed_product(
                &Packed::tiles(&g, depth, rows),
                &Packed::new(&x, depth, columns),
            );
            assert_eq!(found.len(), rows * columns);
            for (i, found) in found.iter().enumerate() {
                let (r, c) = (i / columns, i % columns);
                let terms =
                    (0..depth).map(|k| f64::from(g[k * rows + r]) * f64::from(x[k * columns + c]));
                let expected = terms.sum::<f64>();
                assert!(
                    (f64::from(*found) - expected).abs() < 1e-4,
                    "{depth} {rows} {columns} at {i}"
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
