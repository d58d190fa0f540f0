//! Matrices in panels: packed once a call, or once for good where they are frozen.

use std::ops::Range;

use rayon::prelude::*;

use super::format::PackedFormat;
use super::panel_layout::{PanelLayout, fill_block};
use super::pool::Buffer;

/// A matrix of `depth` rows as panels `[blocks of its columns, depth, W]`.
#[derive(Debug)]
pub struct Packed {
    values: Buffer,
    pub(super) form: PackedFormat,
    depth: PanelLayout,
    columns: PanelLayout,
}

/// The same, borrowed: of a [`Packed`], or blocks of activations as they are.
#[derive(Clone, Copy)]
pub struct PackedView<'a> {
    /// The panels, one after the other.
    pub values: &'a [f32],
    /// How their values are written.
    pub form: PackedFormat,
    /// How the columns of the left side are cut into blocks.
    pub depth: PanelLayout,
    /// The first of the matrix's rows that they meet.
    pub first_row: usize,
    /// All rows of the matrix.
    pub all_rows: usize,
    /// How the columns of the product are cut into blocks.
    pub columns: PanelLayout,
}

impl Packed {
    /// From a matrix `[depth, columns]`, row-major.
    pub fn new(matrix: &[f32], depth: PanelLayout, columns: PanelLayout) -> Self {
        Self::by_panel(matrix, depth, columns, |panel, i| {
            fill_block(panel, matrix, columns, i, 1.0);
        })
    }

    /// From the transpose `[columns, depth]`, row-major, as the weights of an affine map are kept.
    pub fn transposed(matrix: &[f32], depth: PanelLayout, columns: PanelLayout) -> Self {
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
        depth: PanelLayout,
        columns: PanelLayout,
        fill: impl Fn(&mut [f32], usize) + Sync,
    ) -> Self {
        assert_eq!(matrix.len(), depth.count * columns.count);
        let mut values = Buffer::recycled(columns.values(depth.count));
        let panels = values.par_chunks_exact_mut(columns.width * depth.count);
        panels.enumerate().for_each(|(i, panel)| fill(panel, i));
        Self {
            values,
            form: PackedFormat::Single,
            depth,
            columns,
        }
    }

    /// The same matrix, and what it will be multiplied with, rounded to `bf16`.
    pub fn rounded(mut self) -> Self {
        self.form = PackedFormat::rounded(self.depth);
        self.values = self.form.convert(self.values, self.columns.width);
        self
    }

    /// Keeps the matrix for more than one pass.
    pub fn cached(mut self) -> Self {
        self.values.keep();
        self
    }

    /// Borrowed, for a product.
    pub fn panels(&self) -> PackedView<'_> {
        PackedView {
            form: self.form,
            ..PackedView::new(&self.values, self.depth, self.columns)
        }
    }
}

impl<'a> PackedView<'a> {
    /// A whole matrix as `f32`.
    pub fn new(values: &'a [f32], depth: PanelLayout, columns: PanelLayout) -> Self {
        Self {
            values,
            form: PackedFormat::Single,
            depth,
            first_row: 0,
            all_rows: depth.count,
            columns,
        }
    }

    /// Values of the matrix in its form.
    pub(super) fn len(&self) -> usize {
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
