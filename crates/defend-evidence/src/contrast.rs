//! Is the image more like the normal ones than like images in general? Kernel ridge regression against ordinary images.

use ndarray::{Array1, Array2, ArrayView2, Axis};
use rayon::prelude::*;

use crate::linear::{inverse, kernel, product};
use crate::posterior::block_inverse;
use crate::{Error, Groups};

/// Normal images whose mean similarity says how near an ordinary one is to them.
const NEAREST: usize = 5;

/// The rows of `background` `[m, D]` that are not among the share `dropped` nearest to the normal rows `[n, D]`, the least
/// similar first: ordinary images may show the normal class too.
pub fn unlike_normals(
    normal: ArrayView2<'_, f64>,
    background: ArrayView2<'_, f64>,
    dropped: f64,
) -> Vec<usize> {
    let similarities = product(background, normal);
    let count = NEAREST.min(normal.nrows()).max(1);
    let nearness: Vec<f64> = similarities
        .axis_iter(Axis(0))
        .into_par_iter()
        .map(|row| {
            let mut row = row.to_vec();
            if count < row.len() {
                row.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a));
                row.truncate(count);
            }
            row.sort_by(|a, b| b.total_cmp(a));
            row.iter().sum::<f64>() / count as f64
        })
        .collect();
    let mut order: Vec<usize> = (0..background.nrows()).collect();
    order.sort_by(|&a, &b| nearness[a].total_cmp(&nearness[b]).then(a.cmp(&b)));
    order.truncate((background.nrows() as f64 * (1.0 - dropped)) as usize);
    order
}

/// A regression with +1 for normal and -1 for ordinary images, both weighted to the same total.
#[derive(Debug, Clone, PartialEq)]
pub struct Contrast {
    /// Normal rows, then ordinary ones.
    points: Array2<f64>,
    /// One coefficient a row.
    coefficients: Array1<f64>,
    width: f64,
}

impl Contrast {
    /// A regression that was fitted before.
    pub(crate) fn from_parts(points: Array2<f64>, coefficients: Array1<f64>, width: f64) -> Self {
        Self {
            points,
            coefficients,
            width,
        }
    }

    /// One coefficient a row, normal images first.
    pub(crate) fn coefficients(&self) -> &Array1<f64> {
        &self.coefficients
    }

    /// Of the normal unit rows `[n, D]` against ordinary ones `[m, D]`, and the values of the normal ones, each with its whole
    /// group left out: `y - ([A^-1]_GG)^-1 (A^-1 y)_G`, sign turned, larger for more novel.
    ///
    /// # Errors
    /// [`Error::Factorisation`] for rows that are far from unit length.
    pub fn fit(
        normal: ArrayView2<'_, f64>,
        groups: &Groups,
        ordinary: ArrayView2<'_, f64>,
        width: f64,
        ridge: f64,
    ) -> Result<(Self, Vec<f64>), Error> {
        let (n, m) = (normal.nrows(), ordinary.nrows());
        let points =
            ndarray::concatenate(Axis(0), &[normal, ordinary]).map_err(|_| Error::Shape {
                what: "the ordinary images' features".into(),
                found: ordinary.shape().to_vec(),
                expected: vec![m, normal.ncols()],
            })?;
        let total = (n + m) as f64;
        // Weights that sum to the number of images, half of them on each side.
        let weight = |row: usize| total * 0.5 / if row < n { n as f64 } else { m as f64 };
        let target = |row: usize| if row < n { 1.0 } else { -1.0 };
        let mut matrix = kernel(points.view(), points.view(), width);
        for row in 0..n + m {
            matrix[[row, row]] += ridge / weight(row);
        }
        let inverse = inverse(&matrix, "contrast")?;
        let targets = Array1::from_shape_fn(n + m, target);
        let coefficients = inverse.dot(&targets);
        let mut left_out = vec![0.0; n];
        for rows in groups.members() {
            let block = block_inverse(&inverse, &rows)?;
            for (i, &row) in rows.iter().enumerate() {
                let removed: f64 = rows
                    .iter()
                    .enumerate()
                    .map(|(j, r)| block[[i, j]] * coefficients[*r])
                    .sum();
                left_out[row] = removed - 1.0;
            }
        }
        Ok((
            Self {
                points,
                coefficients,
                width,
            },
            left_out,
        ))
    }

    /// Minus the regression's value of unit rows `[B, D]`: about -1 for normal, 1 for ordinary images.
    pub fn evaluate(&self, queries: ArrayView2<'_, f64>) -> Vec<f64> {
        let kernels = kernel(queries, self.points.view(), self.width);
        let value = |row: ndarray::ArrayView1<'_, f64>| -> f64 {
            -row.iter()
                .zip(&self.coefficients)
                .map(|(k, a)| k * a)
                .sum::<f64>()
        };
        kernels
            .axis_iter(Axis(0))
            .into_par_iter()
            .map(value)
            .collect()
    }
}
