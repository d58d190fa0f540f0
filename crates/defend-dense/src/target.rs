//! alpha(Q): what a crop's patches should be assigned to.

use candle_core::{D, Tensor};
use defend_vit::Grid;

use crate::{Assignment, CropBox, Error, Resampling};

/// Share of each source cell in each of `parts` equal parts of `start..start + length`, `[parts, cells]`.
fn overlap(start: usize, length: usize, cells: usize, parts: usize) -> Vec<f32> {
    let step = length as f64 / parts as f64;
    let mut shares = Vec::with_capacity(parts * cells);
    for part in 0..parts {
        let (low, high) = (
            start as f64 + part as f64 * step,
            start as f64 + (part + 1) as f64 * step,
        );
        shares.extend((0..cells).map(|cell| {
            let covered = (high.min(cell as f64 + 1.0) - low.max(cell as f64)).max(0.0);
            (covered / step) as f32
        }));
    }
    shares
}

/// RoIAlign along one axis: bilinear weights of the cells around the centre of each of `parts` parts of
/// `start..start + length`, `[parts, cells]`. A part longer than a cell is the mean over as many samples as it
/// covers cells, rounded up (torchvision's `roi_align` with `aligned` and an adaptive sampling ratio).
fn bilinear(start: usize, length: usize, cells: usize, parts: usize) -> Vec<f32> {
    let samples = length.div_ceil(parts);
    let step = length as f64 / (parts * samples) as f64;
    let last = cells.saturating_sub(1);
    let mut weights = vec![0.0; parts * cells];
    for (part, row) in weights.chunks_exact_mut(cells).enumerate() {
        for sample in part * samples..(part + 1) * samples {
            // Cell i has its centre at i + 1/2.
            let at = start as f64 + (sample as f64 + 0.5) * step - 0.5;
            let at = at.clamp(0.0, last as f64);
            let low = at.floor() as usize;
            let share = (at - low as f64) as f32 / samples as f32;
            row[low] += 1.0 / samples as f32 - share;
            row[(low + 1).min(last)] += share;
        }
    }
    weights
}

impl Resampling {
    /// Grid that targets of a crop of `crop` patches have.
    pub(crate) fn grid(self, crop: Grid) -> Grid {
        match self {
            Self::Area => crop,
            Self::RoiAlign { side } => Grid {
                rows: side,
                columns: side,
            },
        }
    }

    fn axis(self, start: usize, length: usize, cells: usize, parts: usize) -> Vec<f32> {
        match self {
            Self::Area => overlap(start, length, cells, parts),
            Self::RoiAlign { .. } => bilinear(start, length, cells, parts),
        }
    }

    /// Appends the weights `[M, N]` that bring values on `from` under a box to a grid of `to`.
    fn weights(self, at: &CropBox, from: Grid, to: Grid, weights: &mut Vec<f32>) {
        let rows = self.axis(at.row, at.height, from.rows, to.rows);
        let columns = self.axis(at.column, at.width, from.columns, to.columns);
        for row in rows.chunks_exact(from.rows) {
            for column in columns.chunks_exact(from.columns) {
                weights.extend(row.iter().flat_map(|r| column.iter().map(move |c| r * c)));
            }
        }
    }

    /// Scores of crops `[B * C, M, K]` on the grid of their targets, differentiable.
    pub(crate) fn scores(self, scores: &Tensor, crop: Grid) -> Result<Tensor, Error> {
        if self == Self::Area {
            return Ok(scores.clone());
        }
        let whole = CropBox {
            row: 0,
            column: 0,
            height: crop.rows,
            width: crop.columns,
        };
        let (to, mut weights) = (self.grid(crop), Vec::new());
        self.weights(&whole, crop, to, &mut weights);
        let shape = (1, to.patches(), crop.patches());
        let weights =
            Tensor::from_vec(weights, shape, scores.device())?.to_dtype(scores.dtype())?;
        Ok(weights.broadcast_matmul(scores)?)
    }
}

/// alpha(Q) of eq. 1: the view's assignments under each crop, resampled to the grid where they meet the crop's scores.
///
/// `q`: `[B, N, K]`, rows that sum to one; `boxes`: the same number C for every image, image by image;
/// returns `[B * C, M, K]`, rows that sum to one, with M of the crop's grid, or RoIAlign's. With
/// [`Assignment::Hard`] the cells are made one-hot before they are resampled. Each image's boxes pick from its own Q.
///
/// # Errors
/// [`Error::Candle`] when the shapes do not fit.
pub fn crop_targets(
    q: &Tensor,
    boxes: &[CropBox],
    view: Grid,
    crop: Grid,
    assignment: Assignment,
    resampling: Resampling,
) -> Result<Tensor, Error> {
    let (b, n, k) = q.dims3()?;
    let q = match assignment {
        Assignment::Soft => q.clone(),
        Assignment::Hard => one_hot(&q.argmax(D::Minus1)?, k)?.to_dtype(q.dtype())?,
    };
    let to = resampling.grid(crop);
    let mut weights = Vec::with_capacity(boxes.len() * to.patches() * n);
    for at in boxes {
        resampling.weights(at, view, to, &mut weights);
    }
    let positions = boxes.len() / b.max(1) * to.patches();
    let weights = Tensor::from_vec(weights, (b, positions, n), q.device())?.to_dtype(q.dtype())?;
    let targets = weights.matmul(&q.contiguous()?)?;
    Ok(targets.reshape((boxes.len(), to.patches(), k))?)
}

/// `[..]` of class numbers to `[.., K]`.
fn one_hot(classes: &Tensor, k: usize) -> Result<Tensor, Error> {
    let numbers = Tensor::arange(0u32, k as u32, classes.device())?;
    let equal = classes.unsqueeze(D::Minus1)?.broadcast_eq(&numbers)?;
    Ok(equal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn boxes_of_the_crop_grids_size_select_cells_at_every_position() -> Result<(), Error> {
        let (view, crop) = (
            Grid {
                rows: 5,
                columns: 4,
            },
            Grid {
                rows: 2,
                columns: 2,
            },
        );
        // Q of two images, all cells different.
        let q = Tensor::arange(0f32, (2 * 20 * 3) as f32, &Device::Cpu)?.reshape((2, 20, 3))?;
        for row in 0..=3 {
            for column in 0..=2 {
                let at = CropBox {
                    row,
                    column,
                    height: 2,
                    width: 2,
                };
                let targets = crop_targets(
                    &q,
                    &[at, at],
                    view,
                    crop,
                    Assignment::Soft,
                    Resampling::Area,
                )?;
                for image in 0..2 {
                    let cells = [(0, 0), (0, 1), (1, 0), (1, 1)];
                    for (i, (y, x)) in cells.into_iter().enumerate() {
                        let expected = q.get(image)?.get((row + y) * 4 + column + x)?;
                        let found = targets.get(image)?.get(i)?;
                        assert_eq!(found.to_vec1::<f32>()?, expected.to_vec1::<f32>()?);
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn uneven_boxes_average_by_area() {
        // Three cells in two parts: the middle one is shared.
        let shares = overlap(1, 3, 5, 2);
        let third = 1.0f32 / 3.0;
        let expected = [
            0.0,
            2.0 * third,
            third,
            0.0,
            0.0,
            0.0,
            0.0,
            third,
            2.0 * third,
            0.0,
        ];
        assert!(
            shares
                .iter()
                .zip(expected)
                .all(|(a, b)| (a - b).abs() < 1e-6),
            "{shares:?}"
        );
    }
}
