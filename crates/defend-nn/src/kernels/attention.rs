//! Multi-head attention of one image on packed rows of queries, keys and values.

use super::math;
use super::product::{Into, MatRef, product};
use crate::vectorised;

/// Extents of an image's attention.
#[derive(Clone, Copy)]
pub(crate) struct Heads {
    /// Tokens of the image, T.
    pub(crate) tokens: usize,
    /// Channels of all heads together, D.
    pub(crate) width: usize,
    /// Number of heads; divides D.
    pub(crate) count: usize,
}

impl Heads {
    fn head_width(self) -> usize {
        self.width / self.count
    }

    fn scale(self) -> f32 {
        (1.0 / (self.head_width() as f64).sqrt()) as f32
    }

    /// Query (0), key (1) or value (2) of a head in packed rows.
    fn part(self, packed: &[f32], rows: usize, which: usize, head: usize) -> MatRef<'_> {
        let start = which * self.width + head * self.head_width();
        MatRef::strided(&packed[start..], rows, self.head_width(), 3 * self.width)
    }

    /// `softmax(Q K^T / sqrt(d))` of one head, `[queries, T]`.
    fn probabilities(self, out: &mut [f32], q: MatRef<'_>, k: MatRef<'_>) {
        let (n, scale) = (self.tokens, self.scale());
        product(out, n, Into::Overwrite, q, k.transposed(), 1.0, 1);
        vectorised!(|| {
            out.chunks_exact_mut(n)
                .for_each(|row| math::softmax_row(row, scale));
        });
    }

    /// Attention of the queries `first..` of an image's `packed` rows `[T, 3 D]` into `out` `[queries, D]`; `p` is scratch
    /// `[queries, T]`. The first query's attention to the other tokens goes into `first_row` `[h, T - 1]`.
    pub(crate) fn attend(
        self,
        out: &mut [f32],
        packed: &[f32],
        first: usize,
        p: &mut [f32],
        mut first_row: Option<&mut [f32]>,
    ) {
        let (n, d) = (self.tokens, self.width);
        let queries = out.len() / d;
        for head in 0..self.count {
            let q = self.part(&packed[first * 3 * d..], queries, 0, head);
            self.probabilities(p, q, self.part(packed, n, 1, head));
            if let Some(first_row) = &mut first_row {
                first_row[head * (n - 1)..][..n - 1].copy_from_slice(&p[1..n]);
            }
            let (p, v) = (MatRef::dense(p, queries, n), self.part(packed, n, 2, head));
            let out = &mut out[head * self.head_width()..];
            product(out, d, Into::Overwrite, p, v, 1.0, 1);
        }
    }

    /// Gradient of an image's packed rows from that of its attention's output `g` `[T, D]`; `p` and `dp` are scratch
    /// `[T, T]`.
    pub(crate) fn backward(
        self,
        dqkv: &mut [f32],
        packed: &[f32],
        g: &[f32],
        p: &mut [f32],
        dp: &mut [f32],
    ) {
        let (n, d, stride) = (self.tokens, self.head_width(), 3 * self.width);
        for head in 0..self.count {
            let [q, k, v] = [0, 1, 2].map(|which| self.part(packed, n, which, head));
            let g = MatRef::strided(&g[head * d..], n, d, self.width);
            self.probabilities(p, q, k);
            let mut into = |which: usize, left: MatRef<'_>, right: MatRef<'_>, factor: f32| {
                let out = &mut dqkv[which * self.width + head * d..];
                product(out, stride, Into::Overwrite, left, right, factor, 1);
            };
            into(2, MatRef::dense(p, n, n).transposed(), g, 1.0);
            product(dp, n, Into::Overwrite, g, v.transposed(), 1.0, 1);
            // Softmax: dS = P * (dP - sum(P * dP)).
            vectorised!(|| {
                for (p, dp) in p.chunks_exact(n).zip(dp.chunks_exact_mut(n)) {
                    let mean = math::dot(p, dp);
                    let pairs = dp.iter_mut().zip(p);
                    pairs.for_each(|(dp, p)| *dp = p * (*dp - mean));
                }
            });
            let ds = MatRef::dense(dp, n, n);
            into(0, ds, k, self.scale());
            into(1, ds.transposed(), q, self.scale());
        }
    }
}
