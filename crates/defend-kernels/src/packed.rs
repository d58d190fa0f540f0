//! Products of activations in [`super::blocked`] layout: with a matrix in panels, and of two activations over their rows.
//!
//! `gemm` lays both operands of every product out anew. Here a weight matrix is laid out once a call, or once for good where it
//! is frozen; activations are panels as they are, and both sides of a product over their rows. Only the left side of a product
//! with a matrix is copied, into tiles that stay in the cache.

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::bf16::{self, Form};
use super::blocked::{Columns, Rows, Stack, VECTORS, fill_block};
use super::pool::Buffer;
use super::prefetch::{LINE, prefetch};

/// Rows that a tile handles at most, with 16 registers and with 32: with a block's vectors their sums fill the registers.
const TILE_ROWS: [usize; 2] = [6, 12];
/// Steps of the depth that a tile's loop takes at a time. A core that another process shares is limited by the number of
/// instructions: in a loop of single steps a third of them are counters and bounds. With eight steps the compiler runs out of
/// registers.
pub(super) const UNROLL: usize = 4;
/// Rows of the left side are laid out in a multiple of these at most.
pub(super) const ROWS_FILLED: usize = 16;
/// Bytes of a panel that are handled in one go: with a tile's values they fit into the nearest cache. The next panel, which is asked
/// for meanwhile, takes the place of what the tiles have read.
const PANEL_BYTES: usize = 24 * 1024;

/// A matrix of `depth` rows as panels `[blocks of its columns, depth, W]`.
#[derive(Debug)]
pub struct Packed {
    values: Buffer,
    form: Form,
    depth: Columns,
    columns: Columns,
}

/// The same, borrowed: of a [`Packed`], or blocks of activations as they are.
#[derive(Clone, Copy)]
pub struct Panels<'a> {
    /// The panels, one after the other.
    pub values: &'a [f32],
    /// How their values are written.
    pub form: Form,
    /// How the columns of the left side are cut into blocks.
    pub depth: Columns,
    /// The first of the matrix's rows that they meet.
    pub first_row: usize,
    /// All rows of the matrix.
    pub all_rows: usize,
    /// How the columns of the product are cut into blocks.
    pub columns: Columns,
}

impl Packed {
    /// From a matrix `[depth, columns]`, row-major.
    pub fn new(matrix: &[f32], depth: Columns, columns: Columns) -> Self {
        Self::by_panel(matrix, depth, columns, |panel, i| {
            fill_block(panel, matrix, columns, i, 1.0);
        })
    }

    /// From the transpose `[columns, depth]`, row-major, as the weights of an affine map are kept.
    pub fn transposed(matrix: &[f32], depth: Columns, columns: Columns) -> Self {
        Self::by_panel(matrix, depth, columns, |panel, i| {
            let (first, filled) = columns.block(i);
            let rows = matrix[first * depth.count..].chunks_exact(depth.count);
            for (column, row) in rows.take(filled).enumerate() {
                let targets = panel[column..].iter_mut().step_by(columns.width);
                targets
                    .zip(row)
                    .for_each(|(target, value)| *target = *value);
            }
        })
    }

    fn by_panel(
        matrix: &[f32],
        depth: Columns,
        columns: Columns,
        fill: impl Fn(&mut [f32], usize) + Sync,
    ) -> Self {
        assert_eq!(matrix.len(), depth.count * columns.count);
        let mut values = Buffer::stale(columns.values(depth.count));
        let panels = values.par_chunks_exact_mut(columns.width * depth.count);
        panels.enumerate().for_each(|(i, panel)| fill(panel, i));
        Self {
            values,
            form: Form::Single,
            depth,
            columns,
        }
    }

    /// The same matrix, and what it will be multiplied with, rounded to `bf16`.
    pub fn rounded(mut self) -> Self {
        self.form = Form::rounded(self.depth);
        self.values = self.form.convert(self.values, self.columns.width);
        self
    }

    /// Keeps the matrix for more than one pass.
    pub fn kept(mut self) -> Self {
        self.values.keep();
        self
    }

    /// Borrowed, for a product.
    pub fn panels(&self) -> Panels<'_> {
        Panels {
            form: self.form,
            ..Panels::new(&self.values, self.depth, self.columns)
        }
    }
}

impl<'a> Panels<'a> {
    /// A whole matrix as `f32`.
    pub fn new(values: &'a [f32], depth: Columns, columns: Columns) -> Self {
        Self {
            values,
            form: Form::Single,
            depth,
            first_row: 0,
            all_rows: depth.count,
            columns,
        }
    }

    /// Values of the matrix in its form.
    fn len(&self) -> usize {
        self.columns.values(self.all_rows) / self.form.rows_in_a_line()
    }

    /// Some blocks of the columns, which are one group.
    pub fn of_columns(self, blocks: Range<usize>) -> Self {
        let panel = self.len() / self.columns.blocks();
        Self {
            values: &self.values[blocks.start * panel..blocks.end * panel],
            columns: self.columns.part(blocks),
            ..self
        }
    }

    /// Rows that meet some blocks of the left side, whose columns are one group.
    pub fn of_depth(self, blocks: Range<usize>) -> Self {
        Self {
            first_row: self.first_row + self.depth.block(blocks.start).0,
            depth: self.depth.part(blocks),
            ..self
        }
    }
}

/// Rows whose sums fit into the registers.
fn most_rows<S: Simd>() -> usize {
    TILE_ROWS[usize::from(S::REGISTER_COUNT >= 32)]
}

/// What the product is added to.
#[derive(Clone, Copy)]
pub enum Start<'a> {
    /// The destination's old content.
    Kept,
    /// Nothing.
    Zero,
    /// This row, in every row.
    Bias(&'a [f32]),
}

/// Where a product goes.
pub enum Target<'t, 'a> {
    /// Rows `[rows, columns]` one after the other.
    RowMajor(&'t mut [f32]),
    /// One slice `[rows, W]` for each block of columns.
    Blocks(&'t mut [&'a mut [f32]]),
}

impl Target<'_, '_> {
    /// Whether it holds so many rows and columns.
    fn check(&self, rows: usize, columns: Columns) {
        match self {
            Self::RowMajor(values) => assert_eq!(values.len(), rows * columns.count),
            Self::Blocks(blocks) => {
                assert_eq!(blocks.len(), columns.blocks());
                let len = rows * columns.width;
                assert!(blocks.iter().all(|block| block.len() == len));
            }
        }
    }

    /// From a block's first value on, and the distance from one row to the next.
    #[inline(always)]
    fn block(&mut self, i: usize, columns: Columns) -> (&mut [f32], usize) {
        match self {
            Self::RowMajor(rows) => (&mut rows[columns.block(i).0..], columns.count),
            Self::Blocks(blocks) => (blocks[i], columns.width),
        }
    }
}

/// `out = start + factor x M` for the rows of `x`, `[rows, depth]`; `out` is `[rows, columns]`.
///
/// A row's result depends on no other row.
///
/// # Panics
/// When the sides do not fit each other.
pub fn product(
    out: Target<'_, '_>,
    start: Start<'_>,
    x: &Rows<'_>,
    matrix: Panels<'_>,
    factor: f32,
) {
    assert_eq!(x.columns, matrix.depth);
    assert_eq!(x.blocks.len(), x.columns.blocks());
    assert_eq!(matrix.values.len(), matrix.len());
    assert!(matrix.first_row + matrix.depth.count <= matrix.all_rows);
    out.check(x.count, matrix.columns);
    if let Start::Bias(bias) = start {
        assert_eq!(bias.len(), matrix.columns.count);
    }
    let product = Product {
        out,
        start,
        x,
        matrix,
        factor,
    };
    match matrix.form {
        Form::Pairs(processor) => processor.run(product),
        Form::Tiles(processor) => processor.run(product),
        Form::Single | Form::Rounded => pulp::Arch::new().dispatch(product),
    }
}

pub(super) struct Product<'p, 't, 'a> {
    out: Target<'t, 'a>,
    start: Start<'p>,
    pub(super) x: &'p Rows<'p>,
    matrix: Panels<'p>,
    factor: f32,
}

impl Rows<'_> {
    /// Columns of some blocks as tiles one after the other, each `[columns / UNROLL, height, UNROLL]` and then, for the columns
    /// that are left, `[columns, height]`: a tile's values lie in the order in which its product reads them.
    #[inline(always)]
    fn tiles(&self, out: &mut [f32], blocks: Range<usize>, depth: usize, heights: Heights) {
        let width = self.columns.width;
        let grouped = depth / UNROLL * UNROLL;
        let (mut row, mut rest) = (0, out);
        for height in heights {
            let (tile, others) = rest.split_at_mut(height * depth);
            rest = others;
            let (groups, left) = tile.split_at_mut(height * grouped);
            let mut k = 0usize;
            for block in blocks.clone() {
                let filled = self.columns.block(block).1;
                let (lines, next) = self.blocks[block][row * width..].split_at(height * width);
                // The next tile's, which are not where a processor would expect them.
                prefetch(&next[..next.len().min(height * width)]);
                if k.is_multiple_of(UNROLL) && filled.is_multiple_of(UNROLL) {
                    let groups = &mut groups[k * height..][..filled * height];
                    interleave(groups, lines, width, height);
                } else {
                    for (r, line) in lines.chunks_exact(width).enumerate() {
                        for (k, value) in (k..).zip(&line[..filled]) {
                            if k < grouped {
                                let group = k / UNROLL * height + r;
                                groups[group * UNROLL + k % UNROLL] = *value;
                            } else {
                                left[(k - grouped) * height + r] = *value;
                            }
                        }
                    }
                }
                k += filled;
            }
            row += height;
        }
    }

    /// The longest run of blocks from `from` on whose columns are at most `most` together, or one block; and those columns.
    fn run(&self, from: usize, most: usize) -> (Range<usize>, usize) {
        let (mut to, mut depth) = (from, 0);
        while to < self.columns.blocks() {
            let filled = self.columns.block(to).1;
            if to > from && depth + filled > most {
                break;
            }
            depth += filled;
            to += 1;
        }
        (from..to, depth)
    }
}

/// Heights of tiles that are nearly equal: a last one of a row or two would leave the multipliers idle.
#[derive(Clone)]
struct Heights {
    height: usize,
    tiles: usize,
    /// Tiles that are one higher; they come first.
    higher: usize,
}

impl Heights {
    /// For so many rows, of at most `most` each.
    #[inline(always)]
    fn new(rows: usize, most: usize) -> Self {
        let tiles = rows.div_ceil(most);
        Self {
            height: rows.checked_div(tiles).unwrap_or(0),
            tiles,
            higher: rows.checked_rem(tiles).unwrap_or(0),
        }
    }
}

impl Iterator for Heights {
    type Item = usize;

    #[inline(always)]
    fn next(&mut self) -> Option<usize> {
        self.tiles = self.tiles.checked_sub(1)?;
        let higher = usize::from(self.higher > 0);
        self.higher -= higher;
        Some(self.height + higher)
    }
}

impl Product<'_, '_, '_> {
    /// Goes through the matrix part by part, in tiles of so many rows: `lay_out` brings a part of the left side's columns, those
    /// of some blocks and their number, into the order in which `multiply` reads it. That takes the tile's values and what
    /// follows them, its number of rows, the part of a panel, and where the product goes.
    #[inline(always)]
    pub(super) fn by_tiles<S: Simd>(
        mut self,
        heights: &(impl Iterator<Item = usize> + Clone),
        lay_out: impl Fn(&Rows<'_>, &mut [f32], Range<usize>, usize),
        mut multiply: impl FnMut(&[f32], usize, &[f32], Add<'_>, &mut [f32]),
    ) {
        let (depth, columns) = (self.matrix.depth.count, self.matrix.columns);
        let (first_row, all_rows) = (self.matrix.first_row, self.matrix.all_rows);
        let rows_in_a_line = self.matrix.form.rows_in_a_line();
        let width = VECTORS * S::F32_LANES;
        assert_eq!(width, columns.width);
        let most = PANEL_BYTES / (4 * width) * rows_in_a_line;
        // In pairs, values need half the memory, but the last tile's rows may be filled up.
        let laid_out = self.x.count.next_multiple_of(ROWS_FILLED);
        let mut tiles = Buffer::of_thread(laid_out * depth.min(most.max(width)));
        let (mut block, mut from) = (0, 0);
        while block < self.x.columns.blocks() {
            let (blocks, part) = self.x.run(block, most);
            let tiles = &mut tiles[..laid_out * part];
            lay_out(self.x, tiles, blocks.clone(), part);
            let lines = part / rows_in_a_line;
            let before = (first_row + from) / rows_in_a_line * width;
            // Each tile asks for its share of the next panel: a processor does not expect one so far away.
            let count = heights.clone().count().max(1);
            let share = (lines * width / LINE).div_ceil(count).max(1) * LINE;
            let panels = self.matrix.values;
            let panels = panels.chunks_exact(all_rows / rows_in_a_line * width);
            let panels = panels.map(|panel| &panel[before..][..lines * width]);
            let mut panels = panels.enumerate().peekable();
            while let Some((i, panel)) = panels.next() {
                let mut next = panels
                    .peek()
                    .map_or(&[][..], |(_, next)| next)
                    .chunks(share);
                let (first, filled) = columns.block(i);
                let start = match self.start {
                    _ if from > 0 => Start::Kept,
                    Start::Bias(bias) => Start::Bias(&bias[first..first + filled]),
                    start => start,
                };
                let (out, stride) = self.out.block(i, columns);
                let add = Add {
                    filled,
                    stride,
                    start,
                    factor: self.factor,
                };
                let mut row = 0;
                for rows in heights.clone() {
                    prefetch(next.next().unwrap_or_default());
                    let x = &tiles[row * lines..];
                    multiply(x, rows, panel, add, &mut out[row * stride..]);
                    row += rows;
                }
            }
            (block, from) = (blocks.end, from + part);
        }
    }

    /// The same for tiles whose values meet a panel one by one; `prepare` brings them into the matrix's form.
    #[inline(always)]
    pub(super) fn by_tiles_of_values<S: Simd>(
        self,
        prepare: impl Fn(&mut [f32]),
        multiply: impl Fn(&[f32], usize, &[f32], Add<'_>, &mut [f32]),
    ) {
        let heights = Heights::new(self.x.count, most_rows::<S>());
        self.by_tiles::<S>(
            &heights,
            #[inline(always)]
            |x, tiles, blocks, depth| {
                let tiles = &mut tiles[..x.count * depth];
                x.tiles(tiles, blocks, depth, heights.clone());
                prepare(tiles);
            },
            multiply,
        );
    }
}

impl WithSimd for Product<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let rounded = matches!(self.matrix.form, Form::Rounded);
        self.by_tiles_of_values::<S>(
            #[inline(always)]
            |tiles| {
                if rounded {
                    bf16::round(tiles);
                }
            },
            #[inline(always)]
            |x, rows, panel, add, out| {
                let (panel, _) = S::as_simd_f32s(panel);
                ByRow { x, panel, add }.run(simd, rows, out);
            },
        );
    }
}

/// What becomes of a tile's sums.
#[derive(Clone, Copy)]
pub(super) struct Add<'a> {
    /// Columns of the block.
    filled: usize,
    /// From one row of the result to the next.
    pub(super) stride: usize,
    /// For the block's columns.
    start: Start<'a>,
    factor: f32,
}

impl Add<'_> {
    /// `out = start + factor x sums`, row by row.
    #[inline(always)]
    pub(super) fn add<S: Simd, const H: usize>(
        &self,
        simd: S,
        out: &mut [f32],
        sums: [[S::f32s; VECTORS]; H],
    ) {
        let factor = simd.splat_f32s(self.factor);
        if self.filled == VECTORS * S::F32_LANES {
            let start = match self.start {
                Start::Kept => {
                    for (i, sums) in sums.into_iter().enumerate() {
                        let out = self.row::<S>(out, i);
                        out[0] = simd.mul_add_e_f32s(factor, sums[0], out[0]);
                        out[1] = simd.mul_add_e_f32s(factor, sums[1], out[1]);
                    }
                    return;
                }
                Start::Zero => [simd.splat_f32s(0.0); VECTORS],
                Start::Bias(bias) => {
                    let (bias, _) = S::as_simd_f32s(bias);
                    [bias[0], bias[1]]
                }
            };
            for (i, sums) in sums.into_iter().enumerate() {
                let out = self.row::<S>(out, i);
                out[0] = simd.mul_add_e_f32s(factor, sums[0], start[0]);
                out[1] = simd.mul_add_e_f32s(factor, sums[1], start[1]);
            }
        } else {
            // The same on padded copies.
            for (i, sums) in sums.into_iter().enumerate() {
                let out = &mut out[i * self.stride..][..self.filled];
                let mut padded = [simd.splat_f32s(0.0); VECTORS];
                let values: &mut [f32] = pulp::bytemuck::cast_slice_mut(&mut padded);
                match self.start {
                    Start::Kept => values[..self.filled].copy_from_slice(out),
                    Start::Zero => (),
                    Start::Bias(bias) => values[..self.filled].copy_from_slice(bias),
                }
                for (padded, sum) in padded.iter_mut().zip(sums) {
                    *padded = simd.mul_add_e_f32s(factor, sum, *padded);
                }
                let values: &[f32] = pulp::bytemuck::cast_slice(&padded);
                out.copy_from_slice(&values[..self.filled]);
            }
        }
    }

    /// Row `i` of a block that is filled.
    #[inline(always)]
    fn row<'o, S: Simd>(&self, out: &'o mut [f32], i: usize) -> &'o mut [S::f32s] {
        let row = &mut out[i * self.stride..][..VECTORS * S::F32_LANES];
        S::as_mut_simd_f32s(row).0
    }
}

/// A few rows times a part of a panel.
struct ByRow<'a, S: Simd> {
    /// A tile of [`Rows::tiles`].
    x: &'a [f32],
    panel: &'a [S::f32s],
    add: Add<'a>,
}

/// A few columns times a block, over the rows of both: gradients of weights.
struct ByColumn<'a> {
    left: Stack<'a>,
    right: Stack<'a>,
    /// Pieces of both.
    pieces: Range<usize>,
    /// Block of the left side, and the tile's first column in it.
    from: (usize, usize),
    /// Block of the right side.
    to: usize,
    add: Add<'a>,
}

/// Calls a macro with all heights of tiles, and names for the sums of each row.
macro_rules! every_height {
    ($then:ident) => {
        $then! {
            1 one one_column: 0 x0 a0 b0;
            2 two two_columns: 0 x0 a0 b0, 1 x1 a1 b1;
            3 three three_columns: 0 x0 a0 b0, 1 x1 a1 b1, 2 x2 a2 b2;
            4 four four_columns: 0 x0 a0 b0, 1 x1 a1 b1, 2 x2 a2 b2, 3 x3 a3 b3;
            5 five five_columns: 0 x0 a0 b0, 1 x1 a1 b1, 2 x2 a2 b2, 3 x3 a3 b3, 4 x4 a4 b4;
            6 six six_columns: 0 x0 a0 b0, 1 x1 a1 b1, 2 x2 a2 b2, 3 x3 a3 b3, 4 x4 a4 b4, 5 x5 a5 b5;
            7 seven seven_columns: 0 x0 a0 b0, 1 x1 a1 b1, 2 x2 a2 b2, 3 x3 a3 b3, 4 x4 a4 b4, 5 x5 a5 b5, 6 x6 a6 b6;
            8 eight eight_columns: 0 x0 a0 b0, 1 x1 a1 b1, 2 x2 a2 b2, 3 x3 a3 b3, 4 x4 a4 b4, 5 x5 a5 b5, 6 x6 a6 b6, 7 x7 a7 b7;
            9 nine nine_columns: 0 x0 a0 b0, 1 x1 a1 b1, 2 x2 a2 b2, 3 x3 a3 b3, 4 x4 a4 b4, 5 x5 a5 b5, 6 x6 a6 b6, 7 x7 a7 b7, 8 x8 a8 b8;
            10 ten ten_columns: 0 x0 a0 b0, 1 x1 a1 b1, 2 x2 a2 b2, 3 x3 a3 b3, 4 x4 a4 b4, 5 x5 a5 b5, 6 x6 a6 b6, 7 x7 a7 b7, 8 x8 a8 b8, 9 x9 a9 b9;
            11 eleven eleven_columns: 0 x0 a0 b0, 1 x1 a1 b1, 2 x2 a2 b2, 3 x3 a3 b3, 4 x4 a4 b4, 5 x5 a5 b5, 6 x6 a6 b6, 7 x7 a7 b7, 8 x8 a8 b8, 9 x9 a9 b9, 10 x10 a10 b10;
            12 twelve twelve_columns: 0 x0 a0 b0, 1 x1 a1 b1, 2 x2 a2 b2, 3 x3 a3 b3, 4 x4 a4 b4, 5 x5 a5 b5, 6 x6 a6 b6, 7 x7 a7 b7, 8 x8 a8 b8, 9 x9 a9 b9, 10 x10 a10 b10, 11 x11 a11 b11;
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use every_height;

/// Tiles of each height: sums in variables of their own, which the compiler keeps in registers as it does not with arrays.
macro_rules! tiles {
    ($($height:literal $by_row:ident $by_column:ident: $($i:literal $x:ident $low:ident $high:ident),*;)*) => {
        /// Brings `height` lines of a block, `width` values each, into groups `[height, UNROLL]`, as many as `groups` holds.
        #[inline(always)]
        fn interleave(groups: &mut [f32], lines: &[f32], width: usize, height: usize) {
            match height {
                $($height => {
                    let (groups, _) = groups.as_chunks_mut::<{ UNROLL * $height }>();
                    // Of a length that the compiler knows to be the loop's.
                    let count = groups.len();
                    $(let $x = &lines[$i * width..][..width].as_chunks::<UNROLL>().0[..count];)*
                    for (i, group) in groups.iter_mut().enumerate() {
                        $(group[$i * UNROLL..][..UNROLL].copy_from_slice(&$x[i]);)*
                    }
                })*
                _ => unreachable!("a tile of {height} rows"),
            }
        }

        impl<S: Simd> ByRow<'_, S> {
            #[inline(always)]
            fn run(&self, simd: S, rows: usize, out: &mut [f32]) {
                match rows {
                    // Higher tiles are compiled only where there are registers for them.
                    $($height if $height <= most_rows::<S>() => self.$by_row(simd, out),)*
                    _ => unreachable!("a tile of {rows} rows"),
                }
            }

            $(
                #[inline(always)]
                fn $by_row(&self, simd: S, out: &mut [f32]) {
                    $(
                        let mut $low = simd.splat_f32s(0.0);
                        let mut $high = simd.splat_f32s(0.0);
                    )*
                    let (panel, panel_rest) = self.panel.as_chunks::<{ UNROLL * VECTORS }>();
                    let (x, x_rest) = self.x.split_at(panel.len() * UNROLL * $height);
                    let (x, _) = x.as_chunks::<{ UNROLL * $height }>();
                    for (values, lines) in x.iter().zip(panel) {
                        for k in 0..UNROLL {
                            $(
                                let value = simd.splat_f32s(values[$i * UNROLL + k]);
                                $low = simd.mul_add_e_f32s(value, lines[VECTORS * k], $low);
                                $high = simd.mul_add_e_f32s(value, lines[VECTORS * k + 1], $high);
                            )*
                        }
                    }
                    let rest = x_rest.chunks_exact($height);
                    for (values, line) in rest.zip(panel_rest.chunks_exact(VECTORS)) {
                        $(
                            let value = simd.splat_f32s(values[$i]);
                            $low = simd.mul_add_e_f32s(value, line[0], $low);
                            $high = simd.mul_add_e_f32s(value, line[1], $high);
                        )*
                    }
                    self.add.add(simd, out, [$([$low, $high]),*]);
                }
            )*
        }

        impl ByColumn<'_> {
            #[inline(always)]
            fn run<S: Simd>(&self, simd: S, columns: usize, out: &mut [f32]) {
                match columns {
                    $($height if $height <= most_rows::<S>() => self.$by_column(simd, out),)*
                    _ => unreachable!("a tile of {columns} columns"),
                }
            }

            $(
                #[inline(always)]
                fn $by_column<S: Simd>(&self, simd: S, out: &mut [f32]) {
                    let width = VECTORS * S::F32_LANES;
                    $(
                        let mut $low = simd.splat_f32s(0.0);
                        let mut $high = simd.splat_f32s(0.0);
                    )*
                    for piece in self.pieces.clone() {
                        let left = self.left.block(piece, self.from.0);
                        let (right, _) = S::as_simd_f32s(self.right.block(piece, self.to));
                        let (steps, rest) = right.as_chunks::<{ UNROLL * VECTORS }>();
                        for (values, lines) in left.chunks_exact(UNROLL * width).zip(steps) {
                            let values = &values[self.from.1..][..(UNROLL - 1) * width + $height];
                            for k in 0..UNROLL {
                                $(
                                    let value = simd.splat_f32s(values[k * width + $i]);
                                    $low = simd.mul_add_e_f32s(value, lines[VECTORS * k], $low);
                                    $high = simd.mul_add_e_f32s(value, lines[VECTORS * k + 1], $high);
                                )*
                            }
                        }
                        for (k, line) in rest.chunks_exact(VECTORS).enumerate() {
                            let values = &left[(steps.len() * UNROLL + k) * width + self.from.1..][..$height];
                            $(
                                let value = simd.splat_f32s(values[$i]);
                                $low = simd.mul_add_e_f32s(value, line[0], $low);
                                $high = simd.mul_add_e_f32s(value, line[1], $high);
                            )*
                        }
                    }
                    self.add.add(simd, out, [$([$low, $high]),*]);
                }
            )*
        }
    };
}

every_height!(tiles);

/// `factor G^T X` for the columns of some blocks of `left`, G, and all of `right`, X, over their rows.
///
/// An element's sum is taken in an order that depends on nothing but the pieces.
///
/// # Panics
/// When the sides do not fit each other.
pub fn transposed_product(
    out: Target<'_, '_>,
    left: Stack<'_>,
    blocks: Range<usize>,
    right: Stack<'_>,
    factor: f32,
) {
    assert_eq!((left.rows, left.piece), (right.rows, right.piece));
    for side in [&left, &right] {
        assert_eq!(side.values.len(), side.columns.values(side.rows));
    }
    assert!(blocks.end <= left.columns.blocks());
    let rows = blocks.clone().map(|block| left.columns.block(block).1);
    out.check(rows.sum(), right.columns);
    pulp::Arch::new().dispatch(TransposedProduct {
        out,
        left,
        blocks,
        right,
        factor,
    });
}

struct TransposedProduct<'p, 't, 'a> {
    out: Target<'t, 'a>,
    left: Stack<'p>,
    blocks: Range<usize>,
    right: Stack<'p>,
    factor: f32,
}

impl WithSimd for TransposedProduct<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let columns = self.left.columns;
        let width = VECTORS * S::F32_LANES;
        // Whole pieces whose rows of one block stay in the nearest cache.
        let step = (PANEL_BYTES / (4 * width) / self.left.piece).max(1);
        let first_row = columns.block(self.blocks.start).0;
        for from in (0..self.left.pieces()).step_by(step) {
            let pieces = from..(from + step).min(self.left.pieces());
            let start = if from == 0 { Start::Zero } else { Start::Kept };
            for to in 0..self.right.columns.blocks() {
                let (out, stride) = self.out.block(to, self.right.columns);
                let add = Add {
                    filled: self.right.columns.block(to).1,
                    stride,
                    start,
                    factor: self.factor,
                };
                for block in self.blocks.clone() {
                    let (first, filled) = columns.block(block);
                    let mut column = 0;
                    let heights = Heights::new(filled, most_rows::<S>());
                    // What comes after this block from far away: the left side in the first round, a block of the right in each.
                    let unread = if block + 1 < self.blocks.end {
                        (to == 0).then_some((self.left, block + 1))
                    } else {
                        (to + 1 < self.right.columns.blocks()).then_some((self.right, to + 1))
                    };
                    let tiles = heights.tiles;
                    for (i, height) in heights.enumerate() {
                        if let Some((side, block)) = unread {
                            for piece in pieces.clone() {
                                let values = side.block(piece, block);
                                let share = |i: usize| values.len() * i / tiles;
                                prefetch(&values[share(i)..share(i + 1)]);
                            }
                        }
                        let tile = ByColumn {
                            left: self.left,
                            right: self.right,
                            pieces: pieces.clone(),
                            from: (block, column),
                            to,
                            add,
                        };
                        let row = first - first_row + column;
                        tile.run(simd, height, &mut out[row * stride..]);
                        column += height;
                    }
                }
            }
        }
    }
}

/// Blocks of the left side that a task works on at most: their rows' part stays in the second cache.
const BLOCKS_PER_TASK: usize = 8;

/// `G^T X`, `[G's columns, X's columns]`, row-major, on all threads: the gradient of a map's weights from that of its output
/// and its input.
pub fn weight_gradient(g: Stack<'_>, x: Stack<'_>) -> Vec<f32> {
    let inputs = x.columns.count;
    let mut out = vec![0f32; g.columns.count * inputs];
    // Three tasks a thread: with fewer a thread waits longer for the last, with more the right side is read more often. A sum does not
    // depend on its task.
    let blocks = g.columns.blocks();
    let per_task = blocks.div_ceil(3 * rayon::current_num_threads());
    let per_task = per_task.clamp(1, BLOCKS_PER_TASK);
    let mut tasks = Vec::new();
    let mut rest = &mut out[..];
    for first in (0..blocks).step_by(per_task) {
        let blocks = first..(first + per_task).min(blocks);
        let rows: usize = blocks.clone().map(|block| g.columns.block(block).1).sum();
        let (out, others) = rest.split_at_mut(rows * inputs);
        tasks.push((out, blocks));
        rest = others;
    }
    tasks.into_par_iter().for_each(|(out, blocks)| {
        transposed_product(Target::RowMajor(out), g, blocks, x, 1.0);
    });
    out
}

#[cfg(test)]
mod tests {
    use super::super::blocked::{fill, read, split};
    use super::*;

    fn noise(len: usize, step: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * step).sin()).collect()
    }

    fn blocks(x: &[f32], columns: Columns) -> Vec<f32> {
        let mut blocks = vec![f32::NAN; columns.values(x.len() / columns.count)];
        fill(&mut blocks, x, columns, 1.0);
        blocks
    }

    /// The nearest value of eight significant bits.
    fn eight_bits(x: f32) -> f64 {
        let x = f64::from(x);
        let step = (x.abs().log2().floor() - 7.0).exp2();
        if x == 0.0 {
            x
        } else {
            (x / step).round_ties_even() * step
        }
    }

    fn check_product(
        rows: usize,
        [depth, inner]: [usize; 2],
        [columns, outer]: [usize; 2],
        start: Start<'_>,
    ) {
        check_form(rows, [depth, inner], [columns, outer], start, false);
        check_form(rows, [depth, inner], [columns, outer], start, true);
    }

    fn check_form(
        rows: usize,
        [depth, inner]: [usize; 2],
        [columns, outer]: [usize; 2],
        start: Start<'_>,
        rounded: bool,
    ) {
        let form = |packed: Packed| if rounded { packed.rounded() } else { packed };
        let value = |x: f32| if rounded { eight_bits(x) } else { f64::from(x) };
        let (x, m) = (noise(rows * depth, 0.37), noise(depth * columns, 0.73));
        let transpose: Vec<f32> = (0..columns * depth)
            .map(|i| m[i % depth * columns + i / depth])
            .collect();
        let [depths, outs] = [(depth, inner), (columns, outer)]
            .map(|(count, groups)| Columns::grouped(count, groups));
        let blocked = blocks(&x, depths);
        let x_rows = || Rows::all(&blocked, rows, depths);
        let before = noise(rows * columns, 0.11);
        let mut a = before.clone();
        let packed = form(Packed::new(&m, depths, outs));
        let target = Target::RowMajor(&mut a);
        product(target, start, &x_rows(), packed.panels(), 0.5);
        let mut b = blocks(&before, outs);
        let transposed = form(Packed::transposed(&transpose, depths, outs));
        let target = Target::Blocks(&mut split(&mut b, rows));
        product(target, start, &x_rows(), transposed.panels(), 0.5);
        let mut same = vec![0.0; a.len()];
        read(&mut same, &b, outs);
        assert_eq!(a, same);
        for (i, found) in a.iter().enumerate() {
            let (r, c) = (i / columns, i % columns);
            let terms = (0..depth).map(|k| value(x[r * depth + k]) * value(m[k * columns + c]));
            let start = match start {
                Start::Kept => before[i],
                Start::Zero => 0.0,
                Start::Bias(bias) => bias[c],
            };
            let expected = f64::from(start) + 0.5 * terms.sum::<f64>();
            assert!(
                (f64::from(*found) - expected).abs() < 1e-4,
                "{rows} {depth} {columns} at {i}, rounded: {rounded}: {found}, expected {expected}"
            );
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn rounded_products_use_the_instructions_for_them_where_there_are_some() {
        let form = |depth| {
            let packed = Packed::new(
                &vec![0.0; depth * 3],
                Columns::whole(depth),
                Columns::whole(3),
            );
            packed.rounded().form
        };
        let pairs = std::is_x86_feature_detected!("avx512bf16");
        let tiles = |form| matches!(form, Form::Tiles(_));
        println!("pairs: {pairs}, tiles: {}", tiles(form(64)));
        assert_eq!(matches!(form(36), Form::Pairs(_)), pairs);
        assert_eq!(matches!(form(64), Form::Pairs(_)) || tiles(form(64)), pairs);
        // A system may refuse the matrix unit, but none grants it without.
        let listed = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        assert!(!tiles(form(64)) || listed.contains(" amx_bf16"));
        assert!(matches!(form(6), Form::Rounded));
    }

    #[test]
    fn parts_of_a_matrix_make_the_whole_product() {
        for (rounded, depth, columns) in [(false, 90, 70), (true, 90, 70), (true, 96, 96)] {
            let (rows, depths, outs) = (19, Columns::whole(depth), Columns::whole(columns));
            let (x, m) = (noise(rows * depth, 0.37), noise(depth * columns, 0.73));
            let x = blocks(&x, depths);
            let x = Rows::all(&x, rows, depths);
            let m = Packed::new(&m, depths, outs);
            let m = if rounded { m.rounded() } else { m };
            let mut whole = vec![f32::NAN; outs.values(rows)];
            let target = Target::Blocks(&mut split(&mut whole, rows));
            product(target, Start::Zero, &x, m.panels(), 0.5);
            let mut parts = vec![f32::NAN; outs.values(rows)];
            let parts = &mut split(&mut parts, rows)[..];
            let cut = |count: usize| [0..count / 2, count / 2..count];
            for columns in cut(outs.blocks()) {
                for depth in cut(depths.blocks()) {
                    let panels = m.panels().of_columns(columns.clone());
                    let panels = panels.of_depth(depth.clone());
                    let start = match depth.start {
                        0 => Start::Zero,
                        _ => Start::Kept,
                    };
                    let x = Rows {
                        blocks: x.blocks[depth].to_vec(),
                        count: rows,
                        columns: panels.depth,
                    };
                    let target = Target::Blocks(&mut parts[columns.clone()]);
                    product(target, start, &x, panels, 0.5);
                }
            }
            for (i, (part, whole)) in parts.iter().zip(split(&mut whole, rows)).enumerate() {
                let (filled, width) = (outs.block(i).1, outs.width);
                for (part, whole) in part.chunks(width).zip(whole.chunks(width)) {
                    let pairs = part[..filled].iter().zip(whole);
                    pairs.for_each(|(a, b)| assert!((a - b).abs() < 1e-4, "{a} {b}"));
                }
            }
        }
    }

    #[test]
    fn products_of_every_height_and_odd_widths_match_loops() {
        let bias = noise(64, 0.2);
        for rows in 1..=13 {
            check_product(rows, [7, 1], [33, 3], Start::Kept);
            check_product(rows, [64, 2], [64, 1], Start::Bias(&bias));
        }
        // The depth is taken in several parts.
        check_product(5, [800, 1], [64, 2], Start::Bias(&bias));
        check_product(6, [900, 3], [17, 1], Start::Zero);
        check_product(13, [385, 5], [40, 1], Start::Kept);
        check_product(40, [768, 6], [64, 1], Start::Bias(&bias));
        // Rows that fill tiles of 16 and 32, or do not.
        for rows in [15, 16, 17, 31, 32, 33, 48, 50, 99] {
            check_product(rows, [96, 3], [70, 1], Start::Zero);
        }
    }

    #[test]
    fn weight_gradients_match_loops() {
        for (pieces, piece, rows, columns) in [
            (1, 5, 3, 3),
            (4, 100, 12, 16),
            (9, 100, 250, 40),
            (3, 7, 13, 33),
            (2, 9, 1, 64),
            (2, 9, 2, 5),
        ] {
            // The last piece is not whole.
            let depth = pieces * piece - piece / 3;
            let (g, x) = (noise(depth * rows, 0.37), noise(depth * columns, 0.73));
            let [gs, xs] = [(&g, rows), (&x, columns)].map(|(values, count)| {
                let columns = Columns::whole(count);
                let pieces = values.chunks(piece * count);
                (
                    pieces.flat_map(|x| blocks(x, columns)).collect::<Vec<_>>(),
                    columns,
                )
            });
            let stack = |(values, columns)| Stack {
                values,
                rows: depth,
                piece,
                columns,
            };
            let found = weight_gradient(stack((&gs.0, gs.1)), stack((&xs.0, xs.1)));
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
        let (depth, columns) = (Columns::whole(50), Columns::whole(20));
        let m = Packed::new(&m, depth, columns);
        let bias = noise(20, 0.2);
        let run = |x: &[f32], start: Start<'_>| {
            let rows = x.len() / 50;
            let mut out = vec![7.0; rows * 20];
            let x = blocks(x, depth);
            let x = Rows::all(&x, rows, depth);
            product(Target::RowMajor(&mut out), start, &x, m.panels(), 1.0);
            out
        };
        let all = run(&x, Start::Bias(&bias));
        for row in 0..11 {
            let one = run(&x[row * 50..][..50], Start::Bias(&bias));
            assert_eq!(one, all[row * 20..][..20]);
            let bare = run(&x[row * 50..][..50], Start::Zero);
            let pairs = one.iter().zip(&bare).zip(&bias);
            assert!(
                pairs
                    .into_iter()
                    .all(|((one, bare), bias)| (one - bare - bias).abs() < 1e-5)
            );
        }
    }
}
