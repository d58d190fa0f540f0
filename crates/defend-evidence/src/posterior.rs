//! Is the image explained by the normal ones? The posterior variance of a Gaussian process.
//!
//! The squared error of an infinitely wide random student, trained to convergence on the normal images, is the posterior
//! variance of a Gaussian process on them (arXiv 2602.19964): this is the student stage in closed form.

use ndarray::{Array2, ArrayView1, ArrayView2, Axis};
use rayon::prelude::*;

use crate::linear::{inverse, kernel, product, solve, squared_distances};
use crate::{Error, Groups};

/// Variances are not taken to be less.
const LEAST_VARIANCE: f64 = 1e-7;
/// Weight of the distance to the nearest normal image in the logarithm of the variance. Where no kernel reaches, variances are
/// all 1, and this alone orders the images; elsewhere it is below every other effect.
const TIE: f64 = 1e-9;
/// Queries that are judged by their neighbours at a time: bounds the memory for their similarities to all images.
const QUERIES: usize = 128;

/// What the posterior says of an image.
#[derive(Debug, Clone, PartialEq)]
pub struct Explained {
    /// Logarithm of the variance `v = 1 - k^T M^-1 k`, in `-16.2..=0`, with a tie broken by the distance to the nearest.
    pub log_variance: f64,
    /// Groups of normal images by their share of `sum |k_i alpha_i|`, `alpha = M^-1 k`, largest first.
    pub shares: Vec<(usize, f64)>,
}

/// Groups that an explanation names.
pub const NAMED_GROUPS: usize = 5;

/// The logarithm of a variance whose distance from 1 is `explained`, and the nearest normal image at `nearest`.
fn log_variance(explained: f64, nearest: f64) -> f64 {
    // Exact where the image is hardly explained at all, which `(1 - explained).ln()` is not.
    (-explained.min(1.0 - LEAST_VARIANCE)).ln_1p() + TIE * nearest
}

fn shares(weights: impl Iterator<Item = (usize, f64)>, groups: usize) -> Vec<(usize, f64)> {
    let mut of_group = vec![0.0; groups];
    let mut total = 0.0;
    for (group, weight) in weights {
        total += weight.abs();
        if let Some(sum) = of_group.get_mut(group) {
            *sum += weight.abs();
        }
    }
    let mut shares: Vec<(usize, f64)> = of_group
        .into_iter()
        .enumerate()
        .filter(|(_, w)| *w > 0.0)
        .collect();
    let order = |a: &(usize, f64), b: &(usize, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if shares.len() > NAMED_GROUPS {
        shares.select_nth_unstable_by(NAMED_GROUPS - 1, order);
        shares.truncate(NAMED_GROUPS);
    }
    shares.sort_by(order);
    for (_, share) in &mut shares {
        *share /= total;
    }
    shares
}

/// The posterior given all normal images.
#[derive(Debug, Clone)]
pub struct ExactPosterior {
    points: Array2<f64>,
    group_of: Vec<usize>,
    groups: usize,
    width: f64,
    /// `M^-1`, `M = K + ridge I`.
    inverse: Array2<f64>,
}

impl ExactPosterior {
    /// Of unit rows `[n, D]`.
    ///
    /// # Errors
    /// [`Error::Factorisation`] for rows that are far from unit length.
    pub fn fit(
        points: Array2<f64>,
        groups: &Groups,
        width: f64,
        ridge: f64,
    ) -> Result<Self, Error> {
        let mut matrix = kernel(points.view(), points.view(), width);
        matrix.diag_mut().mapv_inplace(|v| v + ridge);
        Ok(Self {
            inverse: inverse(&matrix, "kernel")?,
            points,
            group_of: groups.of.clone(),
            groups: groups.len(),
            width,
        })
    }

    /// `log v` of each normal image when its whole group is left out, without a refit: `diag(([M^-1]_GG)^-1) - ridge`.
    ///
    /// `None` for a single group: nothing would be left.
    ///
    /// # Errors
    /// [`Error::Factorisation`], as for [`ExactPosterior::fit`].
    pub fn left_out(&self, groups: &Groups, ridge: f64) -> Result<Option<Vec<f64>>, Error> {
        if groups.len() < 2 {
            return Ok(None);
        }
        let nearest = nearest_of_other_groups(self.points.view(), &groups.of);
        let mut values = vec![0.0; self.points.nrows()];
        for rows in groups.members() {
            let block = block_inverse(&self.inverse, &rows)?;
            for (i, &row) in rows.iter().enumerate() {
                values[row] = log_variance(1.0 + ridge - block[[i, i]], nearest[row]);
            }
        }
        Ok(Some(values))
    }

    /// Which other groups explain some of the rows when their own groups are left out, as [`Explained::shares`]. No refit: the
    /// others' coefficients are `-([M^-1]_GG)^-1 [M^-1]_Go`.
    ///
    /// # Errors
    /// [`Error::Factorisation`], as for [`ExactPosterior::fit`].
    pub fn left_out_shares(
        &self,
        groups: &Groups,
        rows: &[usize],
    ) -> Result<Vec<Vec<(usize, f64)>>, Error> {
        let members = groups.members();
        let one = |&row: &usize| -> Result<Vec<(usize, f64)>, Error> {
            let group = self.group_of.get(row).copied().unwrap_or_default();
            let own = members.get(group).map(Vec::as_slice).unwrap_or_default();
            let Some(place) = own.iter().position(|member| *member == row) else {
                return Ok(Vec::new());
            };
            let block = block_inverse(&self.inverse, own)?;
            let distances = squared_distances(
                self.points.slice(ndarray::s![row..=row, ..]),
                self.points.view(),
            );
            let others = (0..self.points.nrows()).filter(|&i| self.group_of[i] != group);
            let weight = |i: usize| {
                let column = own.iter().enumerate();
                let alpha: f64 = column
                    .map(|(j, member)| -block[[place, j]] * self.inverse[[*member, i]])
                    .sum();
                (
                    self.group_of[i],
                    (-self.width * distances[[0, i]]).exp() * alpha,
                )
            };
            Ok(shares(others.map(weight), self.groups))
        };
        rows.par_iter().map(one).collect()
    }

    /// Judges unit rows `[B, D]`.
    pub fn evaluate(&self, queries: ArrayView2<'_, f64>) -> Vec<Explained> {
        let distances = squared_distances(queries, self.points.view());
        let mut kernels = distances.clone();
        kernels.par_mapv_inplace(|d| (-self.width * d).exp());
        let alphas = product(kernels.view(), self.inverse.view());
        let rows = (0..queries.nrows()).into_par_iter().map(|i| {
            let (k, alpha) = (kernels.row(i), alphas.row(i));
            let nearest = distances
                .row(i)
                .iter()
                .copied()
                .fold(f64::INFINITY, f64::min);
            let weights = k
                .iter()
                .zip(alpha)
                .zip(&self.group_of)
                .map(|((k, a), group)| (*group, k * a));
            Explained {
                log_variance: log_variance(dot(k, alpha), nearest),
                shares: shares(weights, self.groups),
            }
        });
        rows.collect()
    }
}

fn dot(a: ArrayView1<'_, f64>, b: ArrayView1<'_, f64>) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `([M^-1]_GG)^-1`: what the model says of the rows G when they are left out.
pub(crate) fn block_inverse(matrix: &Array2<f64>, rows: &[usize]) -> Result<Array2<f64>, Error> {
    if let [row] = rows {
        return Ok(Array2::from_elem((1, 1), 1.0 / matrix[[*row, *row]]));
    }
    let block = Array2::from_shape_fn((rows.len(), rows.len()), |(i, j)| {
        matrix[[rows[i], rows[j]]]
    });
    inverse(&block, "left-out group")
}

/// Squared distance of each row to the nearest row of another group.
fn nearest_of_other_groups(rows: ArrayView2<'_, f64>, group_of: &[usize]) -> Vec<f64> {
    let distances = squared_distances(rows, rows);
    let of_row = |(i, row): (usize, ArrayView1<'_, f64>)| {
        let others = row
            .into_iter()
            .zip(group_of)
            .filter(|(_, group)| **group != group_of[i]);
        others.map(|(d, _)| *d).fold(f64::INFINITY, f64::min)
    };
    distances
        .axis_iter(Axis(0))
        .into_par_iter()
        .enumerate()
        .map(of_row)
        .collect()
}

/// The posterior given the nearest normal images alone, for many of them.
///
/// The kernel is so narrow that images farther than the nearest hundred say nothing more, so an image is judged exactly given
/// these (Vecchia's approximation). Only the leaders of groups are kept: copies would take the neighbours' places.
#[derive(Debug, Clone)]
pub struct LocalPosterior {
    points: Array2<f64>,
    /// The same in `f32`, to find neighbours with.
    narrow: Array2<f32>,
    width: f64,
    ridge: f64,
    neighbours: usize,
}

impl LocalPosterior {
    /// Of the leaders' unit rows `[n, D]`.
    pub fn fit(points: Array2<f64>, width: f64, ridge: f64, neighbours: usize) -> Self {
        Self {
            narrow: points.mapv(|v| v as f32),
            points,
            width,
            ridge,
            neighbours,
        }
    }

    /// `log v` of some of its own rows, each with itself left out.
    ///
    /// # Errors
    /// [`Error::Factorisation`] for rows that are far from unit length.
    pub fn left_out(&self, rows: &[usize]) -> Result<Vec<f64>, Error> {
        let judged = self.judge_own(rows)?;
        Ok(judged.into_iter().map(|e| e.log_variance).collect())
    }

    /// Which other rows explain some of its own, each with itself left out, as [`Explained::shares`].
    ///
    /// # Errors
    /// [`Error::Factorisation`] for rows that are far from unit length.
    pub fn left_out_shares(&self, rows: &[usize]) -> Result<Vec<Vec<(usize, f64)>>, Error> {
        let judged = self.judge_own(rows)?;
        Ok(judged.into_iter().map(|e| e.shares).collect())
    }

    fn judge_own(&self, rows: &[usize]) -> Result<Vec<Explained>, Error> {
        let mut judged = Vec::with_capacity(rows.len());
        for some in rows.chunks(QUERIES) {
            let own: Vec<Option<usize>> = some.iter().map(|row| Some(*row)).collect();
            judged.extend(self.judge(self.points.select(Axis(0), some).view(), &own)?);
        }
        Ok(judged)
    }

    /// Judges unit rows `[B, D]`.
    ///
    /// # Errors
    /// [`Error::Factorisation`] for rows that are far from unit length.
    pub fn evaluate(&self, queries: ArrayView2<'_, f64>) -> Result<Vec<Explained>, Error> {
        let mut all = Vec::with_capacity(queries.nrows());
        for some in queries.axis_chunks_iter(Axis(0), QUERIES) {
            all.extend(self.judge(some, &vec![None; some.nrows()])?);
        }
        Ok(all)
    }

    /// `own`: a row that is left out for each query.
    fn judge(
        &self,
        queries: ArrayView2<'_, f64>,
        own: &[Option<usize>],
    ) -> Result<Vec<Explained>, Error> {
        let narrow = queries.mapv(|v| v as f32);
        let similarities = product(narrow.view(), self.narrow.view());
        let one = |i: usize| -> Result<Explained, Error> {
            let near = self.nearest(similarities.row(i), own.get(i).copied().flatten());
            let points = self.points.select(Axis(0), &near);
            let distances = squared_distances(queries.slice(ndarray::s![i..=i, ..]), points.view());
            let k = distances.row(0).mapv(|d| (-self.width * d).exp());
            let mut matrix = kernel(points.view(), points.view(), self.width);
            matrix.diag_mut().mapv_inplace(|v| v + self.ridge);
            let alpha = solve(&matrix, &k, "kernel")?;
            let nearest = distances.iter().copied().fold(f64::INFINITY, f64::min);
            let weights = near
                .iter()
                .copied()
                .zip(k.iter().zip(&alpha).map(|(k, a)| k * a));
            let mut by_place: Vec<(usize, f64)> = shares(
                weights.clone().enumerate().map(|(i, (_, w))| (i, w)),
                near.len(),
            );
            for (place, _) in &mut by_place {
                *place = near[*place];
            }
            Ok(Explained {
                log_variance: log_variance(dot(k.view(), alpha.view()), nearest),
                shares: by_place,
            })
        };
        (0..queries.nrows()).into_par_iter().map(one).collect()
    }

    /// The most similar rows, by number.
    fn nearest(&self, similarities: ArrayView1<'_, f32>, own: Option<usize>) -> Vec<usize> {
        let mut order: Vec<usize> = (0..similarities.len())
            .filter(|i| Some(*i) != own)
            .collect();
        let count = self.neighbours.min(order.len());
        let by =
            |a: &usize, b: &usize| similarities[*b].total_cmp(&similarities[*a]).then(a.cmp(b));
        if count < order.len() {
            order.select_nth_unstable_by(count, by);
            order.truncate(count);
        }
        order.sort_unstable();
        order
    }
}
