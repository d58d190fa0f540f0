//! Random crops on the patch grid, resized to one side.

use candle_core::{Device, Tensor};
use defend_nn::Rng;
use defend_vit::Grid;
use rand::RngExt;

use crate::Error;

/// A rectangle of patches of the full view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CropBox {
    /// First row of patches.
    pub row: usize,
    /// First column of patches.
    pub column: usize,
    /// Rows of patches, at least 1.
    pub height: usize,
    /// Columns of patches, at least 1.
    pub width: usize,
}

/// Draws crop boxes: a random share of the view's area, a random aspect, edges snapped to the patch grid
/// (authors' code).
#[derive(Debug, Clone, Copy)]
pub struct CropSampler {
    area: [f64; 2],
    aspect: [f64; 2],
}

impl CropSampler {
    /// Boxes of `area`, as shares of the view, and `aspect`, width over height: the smallest and the largest.
    pub fn new(area: [f64; 2], aspect: [f64; 2]) -> Self {
        Self { area, aspect }
    }

    /// One box inside `grid`.
    pub fn sample(&self, grid: Grid, rng: &mut Rng) -> CropBox {
        let uniform = |rng: &mut Rng, low: f64, high: f64| low + (high - low) * rng.random::<f64>();
        let area = uniform(rng, self.area[0], self.area[1]) * grid.patches() as f64;
        // Uniform in the logarithm: as many tall boxes as wide ones.
        let aspect = uniform(rng, self.aspect[0].ln(), self.aspect[1].ln()).exp();
        let side = |length: f64, limit: usize| (length.round() as usize).clamp(1, limit);
        let width = side((area * aspect).sqrt(), grid.columns);
        let height = side((area / aspect).sqrt(), grid.rows);
        CropBox {
            row: rng.random_range(0..=grid.rows - height),
            column: rng.random_range(0..=grid.columns - width),
            height,
            width,
        }
    }

    /// `count` boxes inside `grid`.
    pub fn boxes(&self, grid: Grid, count: usize, rng: &mut Rng) -> Vec<CropBox> {
        (0..count).map(|_| self.sample(grid, rng)).collect()
    }
}

/// One axis of an antialiased bilinear resize as a matrix `[target, source]`: the triangle filter,
/// widened by the scale when shrinking, as Pillow and torchvision do it.
fn resize_matrix(source: usize, target: usize, device: &Device) -> Result<Tensor, Error> {
    let scale = source as f64 / target as f64;
    let radius = scale.max(1.0);
    let mut matrix = Vec::with_capacity(target * source);
    for i in 0..target {
        let centre = (i as f64 + 0.5) * scale;
        let weight = |j: usize| (1.0 - ((j as f64 + 0.5 - centre) / radius).abs()).max(0.0);
        let total: f64 = (0..source).map(weight).sum();
        matrix.extend((0..source).map(|j| (weight(j) / total) as f32));
    }
    Ok(Tensor::from_vec(matrix, (target, source), device)?)
}

/// Cuts boxes out of images and resizes them to `size` pixels a side.
///
/// `images`: `[B, 3, H, W]`; `boxes`: the same number for every image, image by image, in patches of
/// `patch` pixels; returns `[boxes, 3, size, size]`.
///
/// # Errors
/// [`Error::Candle`] when a box lies outside its image.
pub fn extract(
    images: &Tensor,
    boxes: &[CropBox],
    patch: usize,
    size: usize,
) -> Result<Tensor, Error> {
    let device = images.device();
    let crops_per_image = boxes.len() / images.dim(0)?.max(1);
    let mut matrices = std::collections::HashMap::new();
    let mut matrix = |side: usize| -> Result<Tensor, Error> {
        if let Some(known) = matrices.get(&side) {
            return Ok(Tensor::clone(known));
        }
        let made = resize_matrix(side, size, device)?.to_dtype(images.dtype())?;
        matrices.insert(side, made.clone());
        Ok(made)
    };
    let crops = boxes
        .iter()
        .enumerate()
        .map(|(i, b)| {
            let (height, width) = (b.height * patch, b.width * patch);
            let pixels = images
                .get(i / crops_per_image.max(1))?
                .narrow(1, b.row * patch, height)?
                .narrow(2, b.column * patch, width)?
                .contiguous()?;
            let across = pixels
                .reshape((3 * height, width))?
                .matmul(&matrix(width)?.t()?)?
                .reshape((3, height, size))?;
            let down = matrix(height)?
                .unsqueeze(0)?
                .broadcast_as((3, size, height))?;
            Ok(down.contiguous()?.matmul(&across)?)
        })
        .collect::<Result<Vec<_>, Error>>()?;
    Ok(Tensor::stack(&crops, 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRID: Grid = Grid {
        rows: 14,
        columns: 14,
    };

    #[test]
    fn boxes_stay_inside_and_cover_the_asked_area() {
        let sampler = CropSampler::new([0.1, 0.3], [3.0 / 4.0, 4.0 / 3.0]);
        let mut rng = Rng::seed(5);
        let boxes: Vec<CropBox> = (0..2000).map(|_| sampler.sample(GRID, &mut rng)).collect();
        for b in &boxes {
            assert!(b.row + b.height <= 14 && b.column + b.width <= 14);
            let area = (b.height * b.width) as f64 / 196.0;
            assert!((0.07..0.36).contains(&area), "{b:?}");
        }
        for edge in 0..=8 {
            assert!(
                boxes.iter().any(|b| b.row == edge),
                "no box starts at row {edge}"
            );
        }
    }

    #[test]
    fn a_crop_of_equal_size_is_the_pixels_themselves() -> Result<(), Error> {
        let images = Tensor::arange(0f32, 2.0 * 3.0 * 64.0, &Device::Cpu)?.reshape((2, 3, 8, 8))?;
        let b = |row, column| CropBox {
            row,
            column,
            height: 2,
            width: 2,
        };
        let crops = extract(&images, &[b(0, 1), b(2, 2)], 2, 4)?;
        let expected = images.get(1)?.narrow(1, 4, 4)?.narrow(2, 4, 4)?;
        let error = (crops.get(1)? - expected)?
            .abs()?
            .flatten_all()?
            .max(0)?
            .to_scalar::<f32>()?;
        assert!(error < 1e-4, "{error}");
        Ok(())
    }

    #[test]
    fn a_ramp_stays_a_ramp() -> Result<(), Error> {
        let row: Vec<f32> = (0..12).map(|x| x as f32).collect();
        let images = Tensor::new(row, &Device::Cpu)?
            .broadcast_as((1, 3, 12, 12))?
            .contiguous()?;
        let whole = CropBox {
            row: 0,
            column: 0,
            height: 3,
            width: 3,
        };
        let crop = extract(&images, &[whole], 4, 8)?
            .flatten_to(2)?
            .get(0)?
            .to_vec1::<f32>()?;
        // F.interpolate(torch.arange(12.)[None, None, None], (1, 8), mode="bilinear", antialias=True)
        let ninths = [3.375, 16.0, 29.0, 43.0, 56.0, 70.0, 83.0, 95.625];
        for (found, expected) in crop.iter().zip(ninths) {
            assert!((found - expected / 9.0).abs() < 1e-4, "{crop:?}");
        }
        Ok(())
    }
}
