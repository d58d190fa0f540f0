//! PatchCore (Roth et al., 2022): distance of each patch to a core set of the normal images' patches.

use std::sync::Arc;

use candle_core::{D, Tensor};
use defend_core::data::Dataset;
use defend_core::nn::{Rng, normal};
use defend_core::vit::{Features, Grid, ImageSource};
use defend_core::{Error, Novelty, NoveltyDetector, Observer};
use rand::RngExt;
use rand::seq::index::sample;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::components::middle::{layers_needed, middle_patches};
use crate::components::neighbours::{Bank, Distance};
use crate::components::scored::{Density, Pool, Scored, mapped};
use crate::method::each_batch;
use crate::{Method, Teacher};

/// Distance of each patch to the nearest of a core set; the largest is the score.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PatchCore {
    /// Share of the patches that the core set keeps. Paper: 0.1 (and 0.01).
    #[serde(alias = "share")]
    pub coreset_sampling_ratio: f64,
    /// Patches that the core set is chosen from, at most: a random part of more. Ours, for sets of thousands of images.
    pub candidates: usize,
}

impl Default for PatchCore {
    fn default() -> Self {
        Self {
            coreset_sampling_ratio: 0.1,
            candidates: 20_000,
        }
    }
}

/// Channels that distances are compared in while the core set is chosen. Authors' code: 128.
const PROJECTED: usize = 128;

struct CoreSet {
    bank: Bank,
    depth: usize,
}

impl Density for CoreSet {
    fn novelties(&self, features: &Features) -> Result<Vec<Novelty>, Error> {
        let patches = neighbourhoods(&middle_patches(features, self.depth)?, features.grid)?;
        let (b, n, d) = patches.dims3()?;
        let distances = self.bank.distances(&patches.reshape((b * n, d))?)?;
        let nearest = distances.min(D::Minus1)?.sqrt()?.reshape((b, n))?;
        mapped(&nearest, features.grid, Pool::Largest)
    }
}

impl Method for PatchCore {
    fn fit(
        &self,
        teacher: &Teacher,
        normal: Arc<dyn Dataset>,
        seed: u64,
        observer: &mut dyn Observer,
    ) -> Result<Box<dyn NoveltyDetector>, Error> {
        if !(self.coreset_sampling_ratio > 0.0 && self.coreset_sampling_ratio <= 1.0) {
            return Err(Error::Config {
                field: "patch-core.coreset_sampling_ratio",
                value: self.coreset_sampling_ratio.to_string(),
                expected: "above 0 and at most 1".into(),
            });
        }
        let depth = teacher.depth();
        let backbone = teacher.backbone(layers_needed(depth))?;
        let images = teacher.read(normal, observer)?;
        let mut rng = Rng::seed(seed);
        let per_image = self.candidates.div_ceil(images.len().max(1));
        let mut kept = Vec::new();
        each_batch(&*backbone, &images, |features| {
            let patches = neighbourhoods(&middle_patches(&features, depth)?, features.grid)?;
            let (b, n, d) = patches.dims3()?;
            let flat = patches.reshape((b * n, d))?;
            // As many of each image, so that memory does not grow with their number.
            let count = per_image.clamp(1, n);
            let rows: Vec<u32> = (0..b)
                .flat_map(|image| {
                    let chosen = sample(&mut rng, n, count).into_iter();
                    chosen
                        .map(move |i| (image * n + i) as u32)
                        .collect::<Vec<_>>()
                })
                .collect();
            kept.push(flat.index_select(&Tensor::new(rows, flat.device())?, 0)?);
            Ok(())
        })?;
        let mut candidates = Tensor::cat(&kept, 0)?;
        let found = candidates.dim(0)?;
        if found > self.candidates.max(1) {
            let some = sample(&mut rng, found, self.candidates.max(1)).into_iter();
            let some: Vec<u32> = some.map(|i| i as u32).collect();
            candidates = candidates.index_select(&Tensor::new(some, candidates.device())?, 0)?;
        }
        let size = (candidates.dim(0)? as f64 * self.coreset_sampling_ratio).ceil() as usize;
        let chosen = core_set(&candidates, size, &mut rng)?;
        let chosen = Tensor::new(chosen, candidates.device())?;
        let density = CoreSet {
            bank: Bank::new(&candidates.index_select(&chosen, 0)?, Distance::Squared)?,
            depth,
        };
        Ok(Scored::boxed(teacher, backbone, density))
    }

    fn layers(&self, depth: usize) -> usize {
        layers_needed(depth)
    }

    fn name(&self) -> String {
        "PatchCore".into()
    }

    fn deviations(&self) -> &'static str {
        "patch tokens of two middle blocks of a ViT in place of a WideResNet's stages; the core set is chosen from a \
         random part of the patches; the largest distance is not weighted by its neighbours, nor the map smoothed"
    }
}

/// Each patch as the mean of the 3 x 3 patches around it, fewer at the edge: `[B, N, D]` to `[B, N, D]`.
fn neighbourhoods(patches: &Tensor, grid: Grid) -> Result<Tensor, Error> {
    let device = patches.device();
    let axis = |length: usize| -> Result<Tensor, Error> {
        let row = |i: usize| {
            let near = |j: &usize| i.abs_diff(*j) <= 1;
            let count = (0..length).filter(near).count() as f32;
            (0..length).map(move |j| if i.abs_diff(j) <= 1 { 1.0 / count } else { 0.0 })
        };
        let values: Vec<f32> = (0..length).flat_map(row).collect();
        Ok(Tensor::from_vec(values, (length, length), device)?)
    };
    let (b, n, d) = patches.dims3()?;
    // Rows first: [B, rows, columns * D], then columns within each row.
    let rows = axis(grid.rows)?.broadcast_left(b)?.contiguous()?;
    let down = rows.matmul(&patches.reshape((b, grid.rows, grid.columns * d))?)?;
    let columns = axis(grid.columns)?
        .broadcast_left(b * grid.rows)?
        .contiguous()?;
    let across = columns.matmul(&down.reshape((b * grid.rows, grid.columns, d))?)?;
    Ok(across.reshape((b, n, d))?)
}

/// Indices of `size` of the rows `[R, D]` that cover all: each next one is the farthest from those before (greedy
/// k-centre), compared in a random projection.
fn core_set(rows: &Tensor, size: usize, rng: &mut Rng) -> Result<Vec<u32>, Error> {
    let (count, d) = rows.dims2()?;
    let size = size.clamp(1, count);
    let width = PROJECTED.min(d);
    let projection = normal((d, width), 1.0 / (width as f64).sqrt(), rng, rows.device())?;
    let projected = rows.matmul(&projection)?.flatten_all()?.to_vec1::<f32>()?;
    let row = |i: usize| &projected[i * width..(i + 1) * width];
    let mut nearest = vec![f32::INFINITY; count];
    let mut next = rng.random_range(0..count);
    let mut chosen = Vec::with_capacity(size);
    loop {
        chosen.push(next as u32);
        if chosen.len() == size {
            return Ok(chosen);
        }
        let centre = row(next);
        nearest
            .par_iter_mut()
            .enumerate()
            .with_min_len(1024)
            .for_each(|(i, nearest)| {
                let pairs = row(i).iter().zip(centre);
                let distance: f32 = pairs.map(|(a, b)| (a - b) * (a - b)).sum();
                *nearest = nearest.min(distance);
            });
        let farthest = (0..count).max_by(|&a, &b| nearest[a].total_cmp(&nearest[b]));
        next = farthest.unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may panic")]

    use candle_core::Device;

    use super::*;

    #[test]
    fn neighbourhoods_are_means_of_what_is_there() {
        let grid = Grid {
            rows: 2,
            columns: 3,
        };
        let values =
            Tensor::new(&[[[1f32], [2.0], [3.0], [4.0], [5.0], [6.0]]], &Device::Cpu).unwrap();
        let means = neighbourhoods(&values, grid)
            .unwrap()
            .flatten_all()
            .unwrap();
        let expected = [3.0, 3.5, 4.0, 3.0, 3.5, 4.0];
        for (found, expected) in means.to_vec1::<f32>().unwrap().iter().zip(expected) {
            assert!((found - expected).abs() < 1e-5, "{found} {expected}");
        }
    }

    #[test]
    fn a_core_set_takes_one_of_each_heap() {
        // Four heaps of 50 points, far apart: four centres are one of each.
        let values: Vec<f32> = (0..200)
            .flat_map(|i| {
                let heap = i % 4;
                (0..16).map(move |j| {
                    if j == heap {
                        100.0
                    } else {
                        ((i * 16 + j) as f32).sin()
                    }
                })
            })
            .collect();
        let rows = Tensor::from_vec(values, (200, 16), &Device::Cpu).unwrap();
        let mut chosen = core_set(&rows, 4, &mut Rng::seed(3)).unwrap();
        for i in &mut chosen {
            *i %= 4;
        }
        chosen.sort_unstable();
        assert_eq!(chosen, [0, 1, 2, 3]);
        assert_eq!(core_set(&rows, 999, &mut Rng::seed(3)).unwrap().len(), 200);
    }
}
