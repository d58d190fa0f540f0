//! Is the image more like the normal ones than like others? Kernel ridge regression against images in general, known abnormal
//! ones, or the images of a folder.

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

/// What a [`Contrast`] says of the images that it was fitted on when they are left out, larger for more novel.
#[derive(Debug, Clone, PartialEq)]
pub struct LeftOut {
    /// Of each normal image without its whole group: `y - ([A^-1]_GG)^-1 (A^-1 y)_G`, sign turned.
    pub normal: Vec<f64>,
    /// Of each other image without itself.
    pub other: Vec<f64>,
}

/// A regression with +1 for normal and -1 for other images, both weighted to the same total.
#[derive(Debug, Clone, PartialEq)]
pub struct Contrast {
    /// Normal rows, then the others.
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

    /// Of the normal unit rows `[n, D]` against other ones `[m, D]`, which count by their `weights` (all alike without), and
    /// the values of all of them when they are left out.
    ///
    /// # Errors
    /// [`Error::Factorisation`] for rows that are far from unit length, [`Error::Shape`] for rows of another width or another
    /// number of weights, [`Error::Empty`] when no other row counts.
    pub fn fit(
        normal: ArrayView2<'_, f64>,
        groups: &Groups,
        other: ArrayView2<'_, f64>,
        weights: Option<&[f64]>,
        width: f64,
        ridge: f64,
    ) -> Result<(Self, LeftOut), Error> {
        let (n, m) = (normal.nrows(), other.nrows());
        let shape = |what: &str, expected: Vec<usize>| Error::Shape {
            what: what.into(),
            found: other.shape().to_vec(),
            expected,
        };
        let points = ndarray::concatenate(Axis(0), &[normal, other])
            .map_err(|_| shape("the other images' features", vec![m, normal.ncols()]))?;
        if let Some(weights) = weights
            && weights.len() != m
        {
            return Err(shape("the other images' features", vec![weights.len()]));
        }
        let of_other = |row: usize| weights.map_or(1.0, |w| w.get(row).copied().unwrap_or(0.0));
        let others: f64 = (0..m).map(of_other).sum();
        if !(0..m).all(|row| of_other(row) > 0.0) || m == 0 {
            return Err(Error::Empty {
                what: "other images with a weight",
            });
        }
        let total = (n + m) as f64;
        // Weights that sum to the number of images, half of them on each side.
        let weight = |row: usize| match row.checked_sub(n) {
            None => total * 0.5 / n as f64,
            Some(other) => total * 0.5 * of_other(other) / others,
        };
        let target = |row: usize| if row < n { 1.0 } else { -1.0 };
        let mut matrix = kernel(points.view(), points.view(), width);
        for row in 0..n + m {
            matrix[[row, row]] += ridge / weight(row);
        }
        let inverse = inverse(&matrix, "contrast")?;
        let targets = Array1::from_shape_fn(n + m, target);
        let coefficients = inverse.dot(&targets);
        let mut of_normal = vec![0.0; n];
        for rows in groups.members() {
            let block = block_inverse(&inverse, &rows)?;
            for (i, &row) in rows.iter().enumerate() {
                let removed: f64 = rows
                    .iter()
                    .enumerate()
                    .map(|(j, r)| block[[i, j]] * coefficients[*r])
                    .sum();
                of_normal[row] = removed - 1.0;
            }
        }
        let alone = |row: usize| 1.0 + coefficients[row] / inverse[[row, row]];
        let of_other = (n..n + m).map(alone).collect();
        Ok((
            Self {
                points,
                coefficients,
                width,
            },
            LeftOut {
                normal: of_normal,
                other: of_other,
            },
        ))
    }

    /// Minus the regression's value of unit rows `[B, D]`: about -1 for normal, 1 for the other images.
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
