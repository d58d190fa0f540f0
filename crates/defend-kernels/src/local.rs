//! Attention of a token at each place of a grid to itself and to the places around it, for one image.

use std::ops::Range;

use super::math;
use crate::vectorised;

/// Extents of a local attention.
#[derive(Debug, Clone, Copy)]
pub struct Local {
    /// Rows and columns of places.
    pub grid: [usize; 2],
    /// Places in each direction that are seen.
    pub reach: usize,
    /// Channels of all heads together, D.
    pub width: usize,
    /// Number of heads; divides D.
    pub heads: usize,
}

impl Local {
    /// Places of the grid, N.
    pub fn places(&self) -> usize {
        self.grid[0] * self.grid[1]
    }

    /// Rows or columns around one of `of`.
    pub fn around(&self, at: usize, of: usize) -> Range<usize> {
        at.saturating_sub(self.reach)..(at + self.reach + 1).min(of)
    }

    /// `out` `[N, D]` from the tokens' own queries, keys and values `[N, 3 D]` and from keys and values of the places `[N, 2 D]`.
    pub fn attend(&self, out: &mut [f32], own: &[f32], seen: &[f32]) {
        let Self {
            grid: [rows, columns],
            width,
            heads,
            ..
        } = *self;
        let d = width / heads;
        let scale = (1.0 / (d as f64).sqrt()) as f32;
        // The token itself first, then the places.
        let (mut logits, mut places) = (Vec::new(), Vec::new());
        let tokens = out.chunks_exact_mut(width).zip(own.chunks_exact(3 * width));
        for (place, (out, own)) in tokens.enumerate() {
            places.clear();
            for row in self.around(place / columns, rows) {
                let around = self.around(place % columns, columns);
                places.extend(around.map(|column| row * columns + column));
            }
            logits.resize(1 + places.len(), 0.0);
            vectorised!(|| {
                for (head, out) in out.chunks_exact_mut(d).enumerate() {
                    // Queries, keys and values follow each other.
                    let own_part = |at: usize| &own[at * width + head * d..][..d];
                    let of_place =
                        |place: usize, at: usize| &seen[(2 * place + at) * width + head * d..][..d];
                    let query = own_part(0);
                    logits[0] = scale * math::dot(query, own_part(1));
                    for (logit, &place) in logits[1..].iter_mut().zip(&places) {
                        *logit = scale * math::dot(query, of_place(place, 0));
                    }
                    let largest = math::max(&logits);
                    for logit in &mut logits {
                        *logit = math::exp(*logit - largest);
                    }
                    let total = math::sum(&logits);
                    for (o, v) in out.iter_mut().zip(own_part(2)) {
                        *o = logits[0] * v;
                    }
                    for (weight, &place) in logits[1..].iter().zip(&places) {
                        for (o, v) in out.iter_mut().zip(of_place(place, 1)) {
                            *o += weight * v;
                        }
                    }
                    for o in out {
                        *o /= total;
                    }
                }
            });
        }
    }
}
