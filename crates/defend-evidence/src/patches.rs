//! Is some small part unlike anything normal? The distance of each patch to the nearest of a memory.

use defend_random::{Rng, standard_normal};
use ndarray::{Array2, Array3, ArrayView2, Axis, s};
use pulp::Arch;
use rand::seq::index::sample;
use rayon::prelude::*;

use crate::linear::product;
use crate::{Error, PatchConfig};

/// Distances are not taken to be less before the logarithm.
const LEAST_DISTANCE: f64 = 1e-12;

/// Patch tokens of some images in a few middle blocks.
#[derive(Debug, Clone, PartialEq)]
pub struct PatchTokens {
    blocks: Vec<Array3<f32>>,
}

impl PatchTokens {
    /// From one array `[images, patches, channels]` for each block; rows are brought to unit length.
    ///
    /// # Errors
    /// [`Error::Empty`] without any block or patch, [`Error::Shape`] when the blocks' numbers of images or patches differ,
    /// [`Error::NotFinite`] naming the first image with such a value.
    pub fn new(blocks: Vec<Array3<f32>>) -> Result<Self, Error> {
        let Some(&[images, patches, _]) = blocks
            .first()
            .map(Array3::shape)
            .and_then(|s| s.first_chunk())
        else {
            return Err(Error::Empty {
                what: "patch tokens",
            });
        };
        let mut units = Vec::with_capacity(blocks.len());
        for (i, block) in blocks.into_iter().enumerate() {
            let what = || format!("patch tokens of middle block {i}");
            let (found, channels) = (block.shape().to_vec(), block.len_of(Axis(2)));
            if found[..2] != [images, patches] || patches == 0 || channels == 0 {
                return Err(Error::Shape {
                    what: what(),
                    found,
                    expected: vec![images, patches.max(1), channels.max(1)],
                });
            }
            let mut block = block.as_standard_layout().into_owned();
            let damaged = block
                .axis_iter_mut(Axis(0))
                .into_par_iter()
                .map(|mut image| {
                    for mut row in image.rows_mut() {
                        let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
                        if !norm.is_finite() {
                            return true;
                        }
                        let norm = norm.max(1e-12);
                        row.mapv_inplace(|v| v / norm);
                    }
                    false
                })
                .collect::<Vec<bool>>();
            if let Some(image) = damaged.iter().position(|d| *d) {
                return Err(Error::NotFinite {
                    what: what(),
                    image,
                });
            }
            units.push(block);
        }
        Ok(Self { blocks: units })
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.blocks.first().map_or(0, |block| block.len_of(Axis(0)))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Patches of an image.
    pub fn patches(&self) -> usize {
        self.blocks.first().map_or(0, |block| block.len_of(Axis(1)))
    }

    /// Unit rows of each block, `[images, patches, channels]`.
    pub fn blocks(&self) -> &[Array3<f32>] {
        &self.blocks
    }
}

/// A core set of normal patches of each block.
#[derive(Debug, Clone, PartialEq)]
pub struct PatchMemory {
    blocks: Vec<CoreSet>,
    worst: usize,
}

/// The patches of one block.
#[derive(Debug, Clone, PartialEq)]
pub struct CoreSet {
    /// Unit rows, `[patches, channels]`.
    pub patches: Array2<f32>,
    /// Group of the image that each is from.
    pub groups: Vec<usize>,
}

/// Patch distances of one image.
#[derive(Debug, Clone, PartialEq)]
pub struct PatchDistances {
    /// Logarithm of the distance of the worst patches, summed over the blocks.
    pub log_worst: f64,
    /// Distance of each patch to the nearest normal one, mean over the blocks, in `0..=2`.
    pub map: Vec<f32>,
}

impl PatchMemory {
    /// From core sets that were chosen before; the mean of the `worst` distances counts for an image.
    pub fn new(blocks: Vec<CoreSet>, worst: usize) -> Self {
        Self { blocks, worst }
    }

    /// Chooses `size` patches of each block by greedy k-centre; `groups`: of each image.
    pub fn choose(
        tokens: &PatchTokens,
        groups: &[usize],
        size: usize,
        config: &PatchConfig,
        rng: &mut Rng,
    ) -> Self {
        let blocks = tokens.blocks.iter().map(|block| {
            let (images, patches, channels) = block.dim();
            let total = images * patches;
            let candidates: Vec<usize> =
                sample(rng, total, config.candidates.min(total)).into_vec();
            let row = |i: usize| block.slice(s![i / patches, i % patches, ..]);
            let mut rows = Array2::zeros((candidates.len(), channels));
            for (mut target, &candidate) in rows.rows_mut().into_iter().zip(&candidates) {
                target.assign(&row(candidate));
            }
            let chosen = core_set(rows.view(), size, config.projected, rng);
            CoreSet {
                groups: chosen
                    .iter()
                    .filter_map(|&i| groups.get(candidates[i] / patches).copied())
                    .collect(),
                patches: rows.select(Axis(0), &chosen),
            }
        });
        Self {
            blocks: blocks.collect(),
            worst: config.worst,
        }
    }

    /// The core sets.
    pub fn blocks(&self) -> &[CoreSet] {
        &self.blocks
    }

    /// Distances of each image's patches; with `left_out`, patches of the image's own group are not looked at.
    ///
    /// # Errors
    /// [`Error::Shape`] for tokens of other blocks or widths.
    pub fn distances(
        &self,
        tokens: &PatchTokens,
        left_out: Option<&[usize]>,
    ) -> Result<Vec<PatchDistances>, Error> {
        let expected: Vec<usize> = self.blocks.iter().map(|b| b.patches.ncols()).collect();
        let found: Vec<usize> = tokens.blocks.iter().map(|b| b.len_of(Axis(2))).collect();
        if found != expected {
            return Err(Error::Shape {
                what: "channels of the patch tokens".into(),
                found,
                expected,
            });
        }
        let one = |image: usize| {
            let own = left_out.and_then(|groups| groups.get(image).copied());
            let mut map = vec![0.0; tokens.patches()];
            let mut log_worst = 0.0;
            for (block, core) in tokens.blocks.iter().zip(&self.blocks) {
                let distances = nearest(block.index_axis(Axis(0), image), core, own);
                for (sum, d) in map.iter_mut().zip(&distances) {
                    *sum += d / self.blocks.len() as f32;
                }
                log_worst += worst_of(distances, self.worst);
            }
            PatchDistances {
                log_worst: log_worst.max(LEAST_DISTANCE).ln(),
                map,
            }
        };
        Ok((0..tokens.len()).into_par_iter().map(one).collect())
    }
}

/// `1 - cosine` of each patch to the nearest of the core set that is not of the group `own`.
fn nearest(patches: ArrayView2<'_, f32>, core: &CoreSet, own: Option<usize>) -> Vec<f32> {
    let similarities = product(patches, core.patches.view());
    let largest = |row: ndarray::ArrayView1<'_, f32>| match own {
        // A maximum of eight lanes: the compiler keeps the order of a single one.
        None => row.as_slice().map_or(f32::NEG_INFINITY, |row| {
            Arch::new().dispatch(|| largest_of(row))
        }),
        Some(own) => {
            let others = row
                .iter()
                .zip(&core.groups)
                .filter(|(_, group)| **group != own);
            // Nothing else is known: as far as can be.
            others.map(|(s, _)| *s).fold(-1.0, f32::max)
        }
    };
    similarities
        .rows()
        .into_iter()
        .map(|row| 1.0 - largest(row))
        .collect()
}

#[inline(always)]
fn largest_of(values: &[f32]) -> f32 {
    const LANES: usize = 32;
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks
        .remainder()
        .iter()
        .copied()
        .fold(f32::NEG_INFINITY, f32::max);
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    lanes.into_iter().fold(rest, f32::max)
}

fn worst_of(mut distances: Vec<f32>, count: usize) -> f64 {
    let count = count.clamp(1, distances.len().max(1));
    distances.sort_by(|a, b| b.total_cmp(a));
    distances
        .iter()
        .take(count)
        .map(|d| f64::from(*d))
        .sum::<f64>()
        / count as f64
}

/// Candidates whose distances to a new centre are computed together: their values stay in the nearest cache.
const CHUNK: usize = 512;

/// Numbers of `size` of the rows `[R, D]` that cover all: each next one is the farthest from those before (greedy k-centre),
/// compared in a random projection to `width` channels.
fn core_set(rows: ArrayView2<'_, f32>, size: usize, width: usize, rng: &mut Rng) -> Vec<usize> {
    let (count, channels) = rows.dim();
    let size = size.min(count);
    if size == count {
        return (0..count).collect();
    }
    let scale = 1.0 / (width as f64).sqrt();
    // Transposed, as `product` wants its right side.
    let projection =
        Array2::from_shape_simple_fn((width, channels), || (standard_normal(rng) * scale) as f32);
    let projected = product(rows, projection.view());
    let mut chunks: Vec<Chunk> = projected
        .axis_chunks_iter(Axis(0), CHUNK)
        .map(|rows| Chunk::new(&rows))
        .collect();
    let arch = Arch::new();
    let mut chosen = Vec::with_capacity(size);
    let mut next = 0;
    while chosen.len() < size {
        chosen.push(next);
        let centre = projected.row(next).to_vec();
        let farthest = chunks
            .par_iter_mut()
            .with_min_len(8)
            .enumerate()
            .map(|(i, chunk)| {
                let (distance, row) = arch.dispatch(|| chunk.approach(&centre));
                (distance, i * CHUNK + row)
            })
            // The lower number of equals, whatever the order of the threads.
            .reduce(
                || (f32::NEG_INFINITY, usize::MAX),
                |a, b| {
                    if b.0 > a.0 || (b.0 == a.0 && b.1 < a.1) {
                        b
                    } else {
                        a
                    }
                },
            );
        next = farthest.1;
    }
    chosen
}

/// Some candidates, channel by channel, and their squared distances to the nearest centre.
struct Chunk {
    /// `[width][candidates]`.
    channels: Vec<[f32; CHUNK]>,
    nearest: [f32; CHUNK],
    filled: usize,
}

impl Chunk {
    fn new(rows: &ArrayView2<'_, f32>) -> Self {
        let mut channels = vec![[0.0; CHUNK]; rows.ncols()];
        for (i, row) in rows.rows().into_iter().enumerate() {
            for (channel, value) in channels.iter_mut().zip(row) {
                channel[i] = *value;
            }
        }
        Self {
            channels,
            nearest: [f32::INFINITY; CHUNK],
            filled: rows.nrows(),
        }
    }

    /// Takes a new centre into account; the largest distance that is left, and its candidate.
    #[inline(always)]
    fn approach(&mut self, centre: &[f32]) -> (f32, usize) {
        let mut distances = [0f32; CHUNK];
        for (channel, value) in self.channels.iter().zip(centre) {
            for (distance, x) in distances.iter_mut().zip(channel) {
                let difference = x - value;
                *distance += difference * difference;
            }
        }
        for (near, distance) in self.nearest.iter_mut().zip(&distances) {
            *near = if *distance < *near { *distance } else { *near };
        }
        let candidates = self.nearest.iter().take(self.filled).enumerate();
        candidates.fold((f32::NEG_INFINITY, 0), |best, (i, d)| {
            if *d > best.0 { (*d, i) } else { best }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_set_takes_one_of_each_heap() {
        // Five heaps of 300 patches, far apart: five centres are one of each, whatever the number of projected channels.
        let mut rng = Rng::seed(1);
        let rows = Array2::from_shape_fn((1500, 12), |(i, j)| {
            let noise = 0.01 * standard_normal(&mut rng) as f32;
            noise + if i % 5 == j { 1.0 } else { 0.0 }
        });
        for width in [16, 17, 64] {
            let mut chosen = core_set(rows.view(), 5, width, &mut Rng::seed(3));
            for row in &mut chosen {
                *row %= 5;
            }
            chosen.sort_unstable();
            assert_eq!(chosen, [0, 1, 2, 3, 4], "{width} channels");
        }
        let all = core_set(rows.view(), 9999, 16, &mut Rng::seed(3));
        assert_eq!(all.len(), 1500);
    }
}
