//! Near copies count as one: bursts, frames of a video, one photo saved twice.

use ndarray::{Array2, ArrayView2, Axis, s};
use rayon::prelude::*;

use crate::linear::{product, squared_distances};

/// Rows of which all pairs are compared for the median distance.
const MEDIAN_ROWS: usize = 4000;
/// Rows that are compared with the leaders so far at a time, where there are many.
const BLOCK: usize = 512;

/// Images by groups of near copies. Each group has a leader, the image that the others are near to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Groups {
    /// Row of each group's leader.
    pub leaders: Vec<usize>,
    /// Group of each row.
    pub of: Vec<usize>,
}

impl Groups {
    /// Rows of the same group as a row, itself included.
    pub fn of_same(&self, row: usize) -> impl Iterator<Item = usize> {
        let group = self.of.get(row).copied();
        let rows = self.of.iter().enumerate();
        rows.filter(move |(_, of)| Some(**of) == group)
            .map(|(row, _)| row)
    }

    /// Every row a group of its own.
    pub fn single(rows: usize) -> Self {
        Self {
            leaders: (0..rows).collect(),
            of: (0..rows).collect(),
        }
    }

    /// Number of groups.
    pub fn len(&self) -> usize {
        self.leaders.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.leaders.is_empty()
    }

    /// Rows of each group, ascending.
    pub fn members(&self) -> Vec<Vec<usize>> {
        let mut members = vec![Vec::new(); self.len()];
        for (row, &group) in self.of.iter().enumerate() {
            if let Some(group) = members.get_mut(group) {
                group.push(row);
            }
        }
        members
    }
}

/// Groups of unit rows `[n, D]`: every row lies within `share` of the median pairwise squared distance of its group's leader.
///
/// Up to 4,000 rows by greedy k-centre from the medoid, each row in the group of its nearest leader. Beyond, where
/// the matrix of all distances would not fit, rows are gone through in their order and lead a group of their own when no
/// leader is near.
pub fn leaders(rows: ArrayView2<'_, f64>, share: f64) -> Groups {
    let n = rows.nrows();
    if n < 3 {
        return Groups::single(n);
    }
    if n > MEDIAN_ROWS {
        return many(rows, share);
    }
    let distances = squared_distances(rows, rows);
    let radius = share * lower_median(above_diagonal(&distances));
    let sums = distances.sum_axis(Axis(1));
    let mut chosen = vec![lowest(sums.iter().copied())];
    let mut nearest = distances.row(chosen[0]).to_owned();
    loop {
        let farthest = highest(nearest.iter().copied());
        if nearest[farthest] <= radius {
            break;
        }
        chosen.push(farthest);
        nearest.zip_mut_with(&distances.row(farthest), |near, d| *near = near.min(*d));
    }
    let to_leaders = distances.select(Axis(1), &chosen);
    let of = to_leaders
        .rows()
        .into_iter()
        .map(|row| lowest(row.iter().copied()))
        .collect();
    Groups {
        leaders: chosen,
        of,
    }
}

fn many(rows: ArrayView2<'_, f64>, share: f64) -> Groups {
    let n = rows.nrows();
    // Evenly spread over an order that has nothing to do with the content.
    let some: Vec<usize> = (0..MEDIAN_ROWS).map(|i| i * n / MEDIAN_ROWS).collect();
    let some = rows.select(Axis(0), &some);
    let radius = share * lower_median(above_diagonal(&squared_distances(some.view(), some.view())));
    let least_similarity = (1.0 - radius / 2.0) as f32;
    let rows = rows.mapv(|v| v as f32);
    let width = rows.ncols();
    let (mut chosen, mut of) = (Vec::new(), Vec::with_capacity(n));
    // The leaders' rows one after the other.
    let mut led: Vec<f32> = Vec::new();
    let nearest_of = |row: &[f32], known: usize, found: &mut (f32, usize), led: &[f32]| {
        // Among the leaders of this block alone: few, since the block is small.
        for (leader, other) in led.chunks_exact(width).enumerate().skip(known) {
            let similarity: f32 = row.iter().zip(other).map(|(a, b)| a * b).sum();
            if similarity > found.0 {
                *found = (similarity, leader);
            }
        }
    };
    for start in (0..n).step_by(BLOCK) {
        let block = rows.slice(s![start..(start + BLOCK).min(n), ..]);
        let known = chosen.len();
        let best = most_similar(block, &led, width);
        for (i, mut found) in best.into_iter().enumerate() {
            let row = block.row(i).to_vec();
            nearest_of(&row, known, &mut found, &led);
            if found.0 >= least_similarity {
                of.push(found.1);
            } else {
                of.push(chosen.len());
                chosen.push(start + i);
                led.extend(row);
            }
        }
    }
    Groups {
        leaders: chosen,
        of,
    }
}

/// Similarity and number of the most similar leader of each row of a block.
fn most_similar(block: ArrayView2<'_, f32>, led: &[f32], width: usize) -> Vec<(f32, usize)> {
    let none = (f32::NEG_INFINITY, 0);
    let Ok(led) = ArrayView2::from_shape((led.len() / width.max(1), width), led) else {
        return vec![none; block.nrows()];
    };
    if led.nrows() == 0 {
        return vec![none; block.nrows()];
    }
    let similarities = product(block, led);
    similarities
        .axis_iter(Axis(0))
        .into_par_iter()
        .map(|row| {
            let pairs = row.iter().copied().enumerate();
            pairs.fold(none, |best, (i, s)| if s > best.0 { (s, i) } else { best })
        })
        .collect()
}

/// The kernel width of the posterior: `factor` over the median squared distance of a leader to the nearest other leader.
/// `nearest`: of [`nearest_leaders`].
///
/// `None` with fewer than two leaders, or when most of them lie on each other: there is no scale.
pub fn kernel_width(nearest: &[Vec<f64>], factor: f64) -> Option<f64> {
    let similarities = nearest.iter().filter_map(|near| near.first());
    let distances: Vec<f64> = similarities.map(|s| (2.0 - 2.0 * s).max(0.0)).collect();
    if distances.is_empty() {
        return None;
    }
    let width = factor / lower_median(distances);
    width.is_finite().then_some(width)
}

/// How alike the images are: the mean of these similarities of [`nearest_leaders`], 0 for a single leader.
pub fn similarity(nearest: &[Vec<f64>]) -> f64 {
    let count: usize = nearest.iter().map(Vec::len).sum();
    let sum: f64 = nearest.iter().flatten().sum();
    if count == 0 { 0.0 } else { sum / count as f64 }
}

/// Similarities of leaders to their `count` nearest other leaders, the nearest first; of at most 4,000 leaders, evenly spread.
pub fn nearest_leaders(rows: ArrayView2<'_, f64>, groups: &Groups, count: usize) -> Vec<Vec<f64>> {
    let all = rows.select(Axis(0), &groups.leaders);
    let total = all.nrows();
    if total < 2 {
        return Vec::new();
    }
    let asked: Vec<usize> = if total > MEDIAN_ROWS {
        (0..MEDIAN_ROWS).map(|i| i * total / MEDIAN_ROWS).collect()
    } else {
        (0..total).collect()
    };
    let count = count.min(total - 1);
    let nearest = |(row, &own): (ndarray::ArrayView1<'_, f64>, &usize)| {
        let others = row.iter().enumerate().filter(|(i, _)| *i != own);
        let mut others: Vec<f64> = others.map(|(_, s)| *s).collect();
        others.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a));
        // A vector of its own: the other one has room for all leaders.
        let mut nearest = others[..count].to_vec();
        // The sum of a partial sort depends on its order.
        nearest.sort_by(|a, b| b.total_cmp(a));
        nearest
    };
    asked
        .chunks(BLOCK)
        .flat_map(|some| {
            let similarities = product(all.select(Axis(0), some).view(), all.view());
            let rows = similarities.axis_iter(Axis(0)).into_par_iter();
            rows.zip(some).map(nearest).collect::<Vec<_>>()
        })
        .collect()
}

fn above_diagonal(matrix: &Array2<f64>) -> Vec<f64> {
    let rows = matrix.rows().into_iter().enumerate();
    rows.flat_map(|(i, row)| row.into_iter().skip(i + 1).copied().collect::<Vec<_>>())
        .collect()
}

/// The median, of an even number the lower of the two, as PyTorch has it; 0 of nothing.
fn lower_median(mut values: Vec<f64>) -> f64 {
    if values.is_empty() {
        return 0.0;
    }
    let middle = (values.len() - 1) / 2;
    *values.select_nth_unstable_by(middle, f64::total_cmp).1
}

/// Position of the lowest value, the first of equals; 0 of nothing.
fn lowest(values: impl Iterator<Item = f64>) -> usize {
    values
        .enumerate()
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .map_or(0, |(i, _)| i)
}

/// Position of the highest value, the first of equals; 0 of nothing.
fn highest(values: impl Iterator<Item = f64>) -> usize {
    lowest(values.map(|v| -v))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Embeddings;
    use defend_random::{Rng, standard_normal};

    /// `n` random unit rows, each followed by `copies` near copies.
    fn burst(n: usize, copies: usize, seed: u64) -> Array2<f64> {
        let mut rng = Rng::seed(seed);
        let mut rows = Vec::new();
        for _ in 0..n {
            let base: Vec<f64> = (0..24).map(|_| standard_normal(&mut rng)).collect();
            for _ in 0..=copies {
                rows.extend(
                    base.iter()
                        .map(|v| (v + 0.05 * standard_normal(&mut rng)) as f32),
                );
            }
        }
        let rows = Array2::from_shape_vec((n * (copies + 1), 24), rows).unwrap();
        Embeddings::new(vec![rows]).unwrap().features(1)
    }

    #[test]
    fn copies_share_a_group() {
        for (n, copies) in [(40, 3), (130, 40)] {
            let rows = burst(n, copies, 3);
            let groups = leaders(rows.view(), 0.2);
            assert_eq!(groups.len(), n);
            for (row, &group) in groups.of.iter().enumerate() {
                assert_eq!(groups.leaders[group] / (copies + 1), row / (copies + 1));
            }
            let members = groups.members();
            assert!(members.iter().all(|m| m.len() == copies + 1));
        }
    }

    #[test]
    fn few_rows_and_single_points() {
        assert_eq!(leaders(burst(2, 0, 1).view(), 0.2), Groups::single(2));
        let same = Array2::from_elem((5, 1), 1.0);
        let groups = leaders(same.view(), 0.2);
        assert_eq!((groups.len(), groups.of.as_slice()), (1, &[0; 5][..]));
        let nearest = |groups: &Groups| nearest_leaders(same.view(), groups, 5);
        assert_eq!(kernel_width(&nearest(&groups), 1.5), None);
        assert_eq!(similarity(&nearest(&groups)), 0.0);
        assert_eq!(kernel_width(&nearest(&Groups::single(5)), 1.5), None);
    }

    #[test]
    fn medians_and_places_are_pytorchs() {
        assert_eq!(lower_median(vec![4.0, 1.0, 3.0, 2.0]), 2.0);
        assert_eq!(lowest([2.0, 1.0, 1.0].into_iter()), 1);
        assert_eq!(highest([2.0, 3.0, 3.0].into_iter()), 1);
    }
}
