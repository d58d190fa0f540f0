//! Distances to the nearest of remembered vectors.

use candle_core::{D, DType, Tensor};
use defend_core::Error;
use defend_core::nn::ops::l2_normalize;

/// How far two vectors are apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Distance {
    /// One less their cosine.
    Cosine,
    /// Squared Euclidean.
    Squared,
}

/// Vectors to be compared with, `[R, D]`.
pub(crate) struct Bank {
    vectors: Tensor,
    /// Squared lengths, `[1, R]`.
    lengths: Tensor,
    distance: Distance,
}

impl Bank {
    /// Remembers `vectors`, `[R, D]`.
    pub(crate) fn new(vectors: &Tensor, distance: Distance) -> Result<Self, Error> {
        let vectors = match distance {
            Distance::Cosine => l2_normalize(vectors)?,
            Distance::Squared => vectors.clone(),
        };
        Ok(Self {
            lengths: vectors.sqr()?.sum(D::Minus1)?.unsqueeze(0)?,
            vectors: vectors.contiguous()?,
            distance,
        })
    }

    /// Distances of `[Q, D]` to all remembered vectors, `[Q, R]`.
    pub(crate) fn distances(&self, queries: &Tensor) -> Result<Tensor, Error> {
        let across = self.vectors.t()?;
        Ok(match self.distance {
            Distance::Cosine => (1.0 - l2_normalize(queries)?.matmul(&across)?)?,
            Distance::Squared => {
                let own = queries.sqr()?.sum_keepdim(D::Minus1)?;
                let products = (queries.matmul(&across)? * 2.0)?;
                own.broadcast_add(&self.lengths)?.sub(&products)?.relu()?
            }
        })
    }

    /// Mean distance of each of `[Q, D]` to its `k` nearest.
    pub(crate) fn nearest(&self, queries: &Tensor, k: usize) -> Result<Vec<f32>, Error> {
        let rows = self
            .distances(queries)?
            .to_dtype(DType::F32)?
            .to_vec2::<f32>()?;
        let mean = |mut row: Vec<f32>| {
            let k = k.min(row.len()).max(1);
            row.sort_by(f32::total_cmp);
            row.iter().take(k).sum::<f32>() / k as f32
        };
        Ok(rows.into_iter().map(mean).collect())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may panic")]

    use candle_core::Device;

    use super::*;

    #[test]
    fn means_of_the_nearest_by_hand() {
        let device = Device::Cpu;
        let bank = Tensor::new(&[[1f32, 0.0], [0.0, 2.0], [3.0, 0.0]], &device).unwrap();
        let query = Tensor::new(&[[2f32, 0.0]], &device).unwrap();
        let squared = Bank::new(&bank, Distance::Squared).unwrap();
        assert_eq!(squared.nearest(&query, 2).unwrap(), [1.0]);
        assert_eq!(
            squared.nearest(&query, 9).unwrap(),
            [(1.0 + 1.0 + 8.0) / 3.0]
        );
        let cosine = Bank::new(&bank, Distance::Cosine).unwrap();
        assert!((cosine.nearest(&query, 3).unwrap()[0] - 1.0 / 3.0).abs() < 1e-6);
    }
}
