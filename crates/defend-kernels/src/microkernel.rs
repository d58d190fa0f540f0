//! The innermost loop: a few rows times a panel, with all sums in registers.

use pulp::Simd;

use super::panel_layout::{PanelLayout, VECTORS};

/// Rows that a tile handles at most, with 16 registers and with 32: with a block's vectors their sums fill the registers.
const MR: [usize; 2] = [6, 12];
/// Steps of the depth that a tile's loop takes at a time. A core that another process shares is limited by the number of
/// instructions: in a loop of single steps a third of them are counters and bounds. With eight steps the compiler runs out of
/// registers.
pub(super) const UNROLL: usize = 4;
/// Bytes of a panel that are handled in one go: with a tile's values they fit into the L1 cache. The next panel, which is asked
/// for meanwhile, takes the place of what the tiles have read.
pub(super) const PANEL_BYTES: usize = 24 * 1024;

/// Rows whose sums fit into the registers.
pub(super) fn most_rows<S: Simd>() -> usize {
    MR[usize::from(S::REGISTER_COUNT >= 32)]
}

/// What the product is added to.
#[derive(Clone, Copy)]
pub enum Accumulate<'a> {
    /// The destination's old content.
    Add,
    /// Nothing.
    Replace,
    /// This row, in every row.
    Bias(&'a [f32]),
}

/// Where a product goes.
pub enum Target<'t, 'a> {
    /// Rows `[rows, columns]` one after the other.
    RowMajor(&'t mut [f32]),
    /// One slice `[rows, W]` for each block of columns.
    Panels(&'t mut [&'a mut [f32]]),
}

impl Target<'_, '_> {
    /// Whether it holds so many rows and columns.
    pub(super) fn check(&self, rows: usize, columns: PanelLayout) {
        match self {
            Self::RowMajor(values) => assert_eq!(values.len(), rows * columns.count),
            Self::Panels(blocks) => {
                assert_eq!(blocks.len(), columns.blocks());
                let len = rows * columns.width;
                assert!(blocks.iter().all(|block| block.len() == len));
            }
        }
    }

    /// From a block's first value on, and the distance from one row to the next.
    #[inline(always)]
    pub(super) fn block(&mut self, i: usize, columns: PanelLayout) -> (&mut [f32], usize) {
        match self {
            Self::RowMajor(rows) => (&mut rows[columns.block(i).0..], columns.count),
            Self::Panels(blocks) => (blocks[i], columns.width),
        }
    }
}

/// Heights of tiles that are nearly equal: a last one of a row or two would leave the multipliers idle.
#[derive(Clone)]
pub(super) struct Heights {
    height: usize,
    pub(super) tiles: usize,
    /// Tiles that are one higher; they come first.
    higher: usize,
}

impl Heights {
    /// For so many rows, of at most `most` each.
    #[inline(always)]
    pub(super) fn new(rows: usize, most: usize) -> Self {
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

/// What becomes of a tile's sums.
#[derive(Clone, Copy)]
pub(super) struct Epilogue<'a> {
    /// PanelLayout of the block.
    pub(super) filled: usize,
    /// From one row of the result to the next.
    pub(super) stride: usize,
    /// For the block's columns.
    pub(super) start: Accumulate<'a>,
    pub(super) factor: f32,
}

impl Epilogue<'_> {
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
                Accumulate::Add => {
                    for (i, sums) in sums.into_iter().enumerate() {
                        let out = self.row::<S>(out, i);
                        out[0] = simd.mul_add_e_f32s(factor, sums[0], out[0]);
                        out[1] = simd.mul_add_e_f32s(factor, sums[1], out[1]);
                    }
                    return;
                }
                Accumulate::Replace => [simd.splat_f32s(0.0); VECTORS],
                Accumulate::Bias(bias) => {
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
                    Accumulate::Add => values[..self.filled].copy_from_slice(out),
                    Accumulate::Replace => (),
                    Accumulate::Bias(bias) => values[..self.filled].copy_from_slice(bias),
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
pub(super) struct ByRow<'a, S: Simd> {
    /// A tile of [`Rows::tiles`].
    pub(super) x: &'a [f32],
    pub(super) panel: &'a [S::f32s],
    pub(super) add: Epilogue<'a>,
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
pub(super) use every_height;

/// Tiles of each height: sums in variables of their own, which the compiler keeps in registers as it does not with arrays.
macro_rules! tiles {
    ($($height:literal $by_row:ident $by_column:ident: $($i:literal $x:ident $low:ident $high:ident),*;)*) => {
        /// Brings `height` lines of a block, `width` values each, into groups `[height, UNROLL]`, as many as `groups` holds.
        #[inline(always)]
        pub(super) fn interleave(groups: &mut [f32], lines: &[f32], width: usize, height: usize) {
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
            pub(super) fn run(&self, simd: S, rows: usize, out: &mut [f32]) {
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
    };
}

every_height!(tiles);
