//! Positional embeddings: resizing learned ones, making fixed ones.

use candle_core::{Device, Tensor};

use crate::{Architecture, Error, Grid};

/// The two bicubic filters of PyTorch's `interpolate(mode = "bicubic", align_corners = False)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bicubic {
    /// As it is by default: coefficient -0.75, borders repeated (DINO, DINOv2).
    Plain,
    /// With `antialias = True`: coefficient -0.5, stretched when shrinking (DINOv2 with registers).
    Antialiased,
}

impl Bicubic {
    /// The filter that a kind of checkpoint was published with.
    pub(crate) fn new(architecture: &Architecture) -> Self {
        match architecture.registers {
            0 => Self::Plain,
            _ => Self::Antialiased,
        }
    }

    /// One axis as a matrix `[target, source]`.
    fn matrix(self, source: usize, target: usize) -> Vec<f32> {
        match self {
            Self::Plain => plain_matrix(source, target),
            Self::Antialiased => antialiased_matrix(source, target),
        }
    }
}

/// Keys' cubic kernel with coefficient `a` at distance `t >= 0`.
fn cubic(a: f64, t: f64) -> f64 {
    if t <= 1.0 {
        ((a + 2.0) * t - (a + 3.0)) * t * t + 1.0
    } else if t < 2.0 {
        ((a * t - 5.0 * a) * t + 8.0 * a) * t - 4.0 * a
    } else {
        0.0
    }
}

fn antialiased_matrix(source: usize, target: usize) -> Vec<f32> {
    let scale = source as f64 / target as f64;
    let stretch = scale.max(1.0);
    let mut matrix = Vec::with_capacity(target * source);
    for i in 0..target {
        let centre = (i as f64 + 0.5) * scale;
        let weight = |j: usize| cubic(-0.5, (j as f64 + 0.5 - centre).abs() / stretch);
        let total: f64 = (0..source).map(weight).sum();
        matrix.extend((0..source).map(|j| (weight(j) / total) as f32));
    }
    matrix
}

fn plain_matrix(source: usize, target: usize) -> Vec<f32> {
    let mut matrix = vec![0f64; target * source];
    let scale = source as f64 / target as f64;
    for (i, row) in matrix.chunks_exact_mut(source).enumerate() {
        let centre = (i as f64 + 0.5) * scale - 0.5;
        let first = centre.floor() as i64 - 1;
        for tap in first..first + 4 {
            let clamped = tap.clamp(0, source as i64 - 1) as usize;
            row[clamped] += cubic(-0.75, (centre - tap as f64).abs());
        }
    }
    matrix.into_iter().map(|v| v as f32).collect()
}

/// Resizes a grid of embeddings `[rows * columns, D]` bicubically to another grid, differentiably.
///
/// Matches PyTorch's `interpolate` to 1e-5.
///
/// # Errors
/// [`Error::Candle`] when the tensor does not have `from.patches()` rows.
pub fn resize(embedding: &Tensor, from: Grid, to: Grid, filter: Bicubic) -> Result<Tensor, Error> {
    if from == to {
        return Ok(embedding.clone());
    }
    let device = embedding.device();
    let d = embedding.dim(1)?;
    let axis = |source, target| -> Result<Tensor, Error> {
        let matrix = Tensor::from_vec(filter.matrix(source, target), (target, source), device)?;
        Ok(matrix.to_dtype(embedding.dtype())?)
    };
    let rows = axis(from.rows, to.rows)?
        .matmul(&embedding.reshape((from.rows, from.columns * d))?)?
        .reshape((to.rows, from.columns, d))?;
    let across = rows.transpose(0, 1)?.reshape((from.columns, to.rows * d))?;
    let both = axis(from.columns, to.columns)?
        .matmul(&across)?
        .reshape((to.columns, to.rows, d))?;
    Ok(both.transpose(0, 1)?.reshape((to.patches(), d))?)
}

/// MAE's fixed two-dimensional sine-cosine embedding, `[N, D]`, for a width divisible by four.
///
/// The first half of the channels encodes the column, the second the row, each as sines then cosines of
/// frequencies `10000^(-2 i / (D / 2))`.
///
/// # Errors
/// [`Error::Config`] for another width.
pub fn sin_cos(grid: Grid, width: usize, device: &Device) -> Result<Tensor, Error> {
    if width == 0 || !width.is_multiple_of(4) {
        return Err(Error::Config {
            origin: "sine-cosine positional embedding".into(),
            reason: format!("width is {width}, expected a multiple of 4"),
        });
    }
    let quarter = width / 4;
    let mut values = Vec::with_capacity(grid.patches() * width);
    for row in 0..grid.rows {
        for column in 0..grid.columns {
            for position in [column, row] {
                let angle = |i: usize| position as f64 / 10_000f64.powf(i as f64 / quarter as f64);
                values.extend((0..quarter).map(|i| angle(i).sin() as f32));
                values.extend((0..quarter).map(|i| angle(i).cos() as f32));
            }
        }
    }
    Ok(Tensor::from_vec(values, (grid.patches(), width), device)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_constant_embedding_stays_constant() -> Result<(), Error> {
        let square = |side| Grid {
            rows: side,
            columns: side,
        };
        let ones = Tensor::ones((196, 3), candle_core::DType::F32, &Device::Cpu)?;
        for filter in [Bicubic::Plain, Bicubic::Antialiased] {
            let resized = resize(
                &ones,
                square(14),
                Grid {
                    rows: 6,
                    columns: 9,
                },
                filter,
            )?;
            assert_eq!(resized.dims(), [54, 3]);
            let off = (resized - 1.0)?
                .abs()?
                .flatten_all()?
                .max(0)?
                .to_scalar::<f32>()?;
            assert!(off < 1e-6);
        }
        Ok(())
    }

    #[test]
    fn positions_are_told_apart() -> Result<(), Error> {
        let grid = Grid {
            rows: 14,
            columns: 14,
        };
        let e = sin_cos(grid, 32, &Device::Cpu)?;
        let products = e.matmul(&e.t()?)?.to_vec2::<f32>()?;
        for (i, row) in products.iter().enumerate() {
            let best = row
                .iter()
                .enumerate()
                .max_by(|a, b| a.1.total_cmp(b.1))
                .map(|(j, _)| j);
            assert_eq!(best, Some(i));
        }
        assert!(sin_cos(grid, 30, &Device::Cpu).is_err());
        Ok(())
    }
}
