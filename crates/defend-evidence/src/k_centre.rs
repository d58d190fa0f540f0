//! Greedy k-centre on many patches: those that cover all.

use std::cmp::Reverse;

use defend_random::{Rng, standard_normal};
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use crate::linear::{product, vectorised};

/// Candidates that a thread takes at a time.
const CHUNK: usize = 1024;
/// Channels that are compared without a loop, as many as the default projects to.
const LANES: usize = 64;

/// A random projection of the rows `[R, D]` to `width` channels, which keeps distances about as they are.
pub(crate) fn project(rows: ArrayView2<'_, f32>, width: usize, rng: &mut Rng) -> Array2<f32> {
    let scale = 1.0 / (width as f64).sqrt();
    // Transposed, as `product` wants its right side.
    let shape = (width, rows.ncols());
    let projection = Array2::from_shape_simple_fn(shape, || (standard_normal(rng) * scale) as f32);
    product(rows, projection.view())
}

/// Values on one scale in `-127..=127`: 60,000 candidates of 64 channels stay in the processor's cache.
pub(crate) fn eight_bits(rows: &Array2<f32>) -> Array2<i8> {
    let largest = rows.iter().fold(0f32, |top, v| top.max(v.abs()));
    let scale = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    rows.mapv(|v| (v * scale).round() as i8)
}

/// Some numbers below `total` and the `count` first others.
pub(crate) fn and_others(mut chosen: Vec<usize>, total: usize, count: usize) -> Vec<usize> {
    let mut taken = vec![false; total];
    for &i in &chosen {
        taken[i] = true;
    }
    chosen.extend((0..total).filter(|&i| !taken[i]).take(count));
    chosen
}

/// Numbers of `size` of the rows that cover all: from the first on, each next one is the farthest from those before (greedy
/// k-centre); fewer than `size` when all others are equal to one of them.
pub(crate) fn farthest_first(rows: &Array2<i8>, size: usize) -> Vec<usize> {
    let width = rows.ncols().max(1);
    let Some(values) = rows.as_slice() else {
        return farthest_first(&rows.as_standard_layout().into_owned(), size);
    };
    let row = |i: usize| &values[i * width..(i + 1) * width];
    let mut chunks: Vec<Candidates<'_>> = values
        .chunks(CHUNK * width)
        .map(|rows| Candidates::new(rows, width))
        .collect();
    let mut chosen: Vec<usize> = Vec::with_capacity(size);
    let mut next = 0;
    while chosen.len() < size {
        chosen.push(next);
        let centre = row(next);
        let mut quarters = vec![0; chosen.len()];
        for (quarter, &other) in quarters.iter_mut().zip(&chosen) {
            *quarter = squared_distance(centre, row(other)) / 4;
        }
        let farthest = chunks
            .par_iter_mut()
            .with_min_len(8)
            .enumerate()
            .map(|(i, chunk)| {
                let largest = vectorised(
                    #[inline(always)]
                    || chunk.approach(centre, &quarters),
                );
                // The lower number of equals, whatever the order of the threads.
                (largest, Reverse(i))
            })
            .max();
        let farthest = farthest.and_then(|(largest, Reverse(i))| {
            // Where the largest distance is none, every candidate is as one of the chosen.
            let nearest = &chunks.get(i).filter(|_| largest > 0)?.nearest;
            Some(i * CHUNK + nearest.iter().position(|d| *d == largest)?)
        });
        match farthest {
            Some(row) => next = row,
            None => break,
        }
    }
    chosen
}

/// Some candidates, and the nearest centre of each.
struct Candidates<'a> {
    /// `[candidates, width]`.
    rows: &'a [i8],
    width: usize,
    /// Squared distance to the nearest centre.
    nearest: Vec<u32>,
    /// The place of that centre among the chosen.
    centre: Vec<u32>,
    /// Room for the numbers of candidates that are to be looked at.
    looked_at: Vec<u32>,
}

impl<'a> Candidates<'a> {
    fn new(rows: &'a [i8], width: usize) -> Self {
        let count = rows.len() / width;
        Self {
            rows,
            width,
            nearest: vec![u32::MAX; count],
            centre: vec![0; count],
            looked_at: vec![0; count],
        }
    }

    /// Takes a new centre into account, given a quarter of its squared distance to every chosen one, itself included; the
    /// largest distance that is left.
    ///
    /// A candidate whose centre is at least twice as far from the new one as from it cannot be nearer to the new one
    /// (triangle inequality): most are passed over without a look at their channels.
    #[inline(always)]
    fn approach(&mut self, centre: &[i8], quarters: &[u32]) -> u32 {
        let place = quarters.len().saturating_sub(1) as u32;
        // Without a branch: which ones they are cannot be guessed.
        let mut count = 0;
        for (i, (near, own)) in self.nearest.iter().zip(&self.centre).enumerate() {
            self.looked_at[count] = i as u32;
            let quarter = quarters.get(*own as usize).copied().unwrap_or(0);
            count += usize::from(*near > quarter);
        }
        for &i in &self.looked_at[..count] {
            let i = i as usize;
            let row = &self.rows[i * self.width..(i + 1) * self.width];
            let distance = squared_distance(row, centre);
            if distance < self.nearest[i] {
                (self.nearest[i], self.centre[i]) = (distance, place);
            }
        }
        self.nearest.iter().copied().fold(0, u32::max)
    }
}

/// Squared distance of two rows of the same length, at most 30,000 channels.
#[inline(always)]
fn squared_distance(a: &[i8], b: &[i8]) -> u32 {
    let square = |(a, b): (&i8, &i8)| {
        let difference = i16::from(*a) - i16::from(*b);
        i32::from(difference) * i32::from(difference)
    };
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    let mut sum: i32 = a_rest.iter().zip(b_rest).map(square).sum();
    for (a, b) in a.iter().zip(b) {
        sum += a.iter().zip(b).map(square).sum::<i32>();
    }
    sum as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passing_over_candidates_changes_no_choice() {
        let mut rng = Rng::seed(7);
        // Heaps of different sizes and widths, so that candidates are passed over and looked at.
        let rows = Array2::from_shape_fn((3000, 40), |(i, j)| {
            let heap = (i * i) % 17;
            let centre = ((heap * 31 + j * 7) % 11) as f32;
            centre + (0.1 + heap as f32 / 10.0) * standard_normal(&mut rng) as f32
        });
        let rows = eight_bits(&rows);
        let squared = |a: usize, b: usize| -> u32 {
            let pairs = rows.row(a).into_iter().zip(rows.row(b));
            let differences = pairs.map(|(a, b)| i32::from(*a) - i32::from(*b));
            differences.map(|d| (d * d) as u32).sum()
        };
        let mut nearest = vec![u32::MAX; rows.nrows()];
        let mut expected: Vec<usize> = vec![0];
        while expected.len() < 400 {
            let centre = expected[expected.len() - 1];
            for (row, near) in nearest.iter_mut().enumerate() {
                *near = squared(row, centre).min(*near);
            }
            let largest = nearest.iter().max().unwrap();
            expected.extend(nearest.iter().position(|d| d == largest));
        }
        assert_eq!(farthest_first(&rows, 400), expected);
    }

    #[test]
    fn eight_bits_keep_the_extremes_and_survive_zeros() {
        let rows = Array2::from_shape_vec((1, 4), vec![-2.0, 1.0, 0.0, 0.005]).unwrap();
        assert_eq!(
            eight_bits(&rows).into_raw_vec_and_offset().0,
            [-127, 64, 0, 0]
        );
        let zeros = eight_bits(&Array2::zeros((3, 2)));
        assert_eq!(farthest_first(&zeros, 2), [0], "all are as the first");
    }
}
