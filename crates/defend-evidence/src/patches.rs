//! Is some small part unlike anything normal? The distance of each patch to the nearest of a memory.

use defend_random::Rng;
use ndarray::{Array2, Array3, ArrayView2, Axis, s};
use rand::seq::index::sample;
use rayon::prelude::*;

use crate::k_centre::{and_others, eight_bits, farthest_first, project};
use crate::linear::{product, vectorised};
use crate::{Error, FaultDirection, PatchConfig};

/// Distances are not taken to be less before the logarithm.
const LEAST_DISTANCE: f64 = 1e-12;

/// Patch tokens of some images in a few middle blocks.
#[derive(Debug, Clone, PartialEq)]
pub struct PatchTokens {
    blocks: Vec<Array3<f32>>,
    /// Patches of each part of an image; none where an image is one part.
    parts: Vec<Vec<usize>>,
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
        Ok(Self {
            blocks: units,
            parts: Vec::new(),
        })
    }

    /// Of images in parts, such as tiles: an image is as its worst part. `part_of`: the part of each patch, from 0.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of patches.
    pub fn in_parts(mut self, part_of: &[usize]) -> Result<Self, Error> {
        if part_of.len() != self.patches() {
            return Err(Error::Shape {
                what: "parts of the patches".into(),
                found: vec![part_of.len()],
                expected: vec![self.patches()],
            });
        }
        let parts = part_of.iter().max().map_or(0, |last| last + 1);
        self.parts = vec![Vec::new(); parts];
        for (patch, &part) in part_of.iter().enumerate() {
            if let Some(part) = self.parts.get_mut(part) {
                part.push(patch);
            }
        }
        self.parts.retain(|part| !part.is_empty());
        Ok(self)
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

    /// Some of the images, in the order asked for.
    #[must_use]
    pub fn select(&self, images: &[usize]) -> Self {
        let blocks = self.blocks.iter();
        Self {
            blocks: blocks.map(|block| block.select(Axis(0), images)).collect(),
            parts: self.parts.clone(),
        }
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
    /// Of each block, or none.
    faults: Vec<FaultDirection>,
}

/// The patches of one block.
#[derive(Debug, Clone, PartialEq)]
pub struct CoreSet {
    /// Unit rows, `[patches, channels]`.
    pub patches: Array2<f32>,
    /// Group of the image that each is from.
    pub groups: Vec<usize>,
}

impl CoreSet {
    /// The patches of some groups, under other numbers.
    pub(crate) fn with_groups(&self, number: impl Fn(usize) -> Option<usize>) -> Self {
        let (rows, groups): (Vec<usize>, Vec<usize>) = self
            .groups
            .iter()
            .enumerate()
            .filter_map(|(row, &group)| Some((row, number(group)?)))
            .unzip();
        Self {
            patches: self.patches.select(Axis(0), &rows),
            groups,
        }
    }
}

/// Patch distances of one image.
#[derive(Debug, Clone, PartialEq)]
pub struct PatchDistances {
    /// Logarithm of the distance of the worst patches, summed over the blocks; of the worst part of an image in parts.
    pub log_worst: f64,
    /// Distance of each patch to the nearest normal one, mean over the blocks, in `0..=2`.
    pub map: Vec<f32>,
}

impl PatchMemory {
    /// From core sets that were chosen before; the mean of the `worst` distances counts for an image.
    pub fn new(blocks: Vec<CoreSet>, worst: usize) -> Self {
        Self {
            blocks,
            worst,
            faults: Vec::new(),
        }
    }

    /// With what known faults look like in each block.
    pub(crate) fn with_faults(mut self, faults: Vec<FaultDirection>) -> Self {
        self.faults = faults;
        self
    }

    pub(crate) fn without_faults(&self) -> Self {
        self.clone().with_faults(Vec::new())
    }

    /// What known faults look like in each block, where some are known.
    pub fn faults(&self) -> &[FaultDirection] {
        &self.faults
    }

    /// Chooses patches of each block by greedy k-centre in a random projection, and some more at random: the former reach out to
    /// every patch there is, the latter stand where most are. `groups`: of each image.
    pub fn choose(
        tokens: &PatchTokens,
        groups: &[usize],
        config: &PatchConfig,
        rng: &mut Rng,
    ) -> Self {
        let (size, random) = (config.core, config.random);
        // Random numbers in the order of the blocks; then a block on each thread.
        let drawn: Vec<_> = tokens
            .blocks
            .iter()
            .map(|block| {
                let (images, patches, channels) = block.dim();
                let total = images * patches;
                let candidates = sample(rng, total, config.candidates.min(total)).into_vec();
                let mut rows = Array2::zeros((candidates.len(), channels));
                for (mut target, &i) in rows.rows_mut().into_iter().zip(&candidates) {
                    target.assign(&block.slice(s![i / patches, i % patches, ..]));
                }
                let projected = (size + random < candidates.len())
                    .then(|| eight_bits(&project(rows.view(), config.projected, rng)));
                let images: Vec<usize> = candidates.iter().map(|i| i / patches).collect();
                (rows, images, projected)
            })
            .collect();
        let blocks = drawn.into_par_iter().map(|(rows, images, projected)| {
            let chosen = match projected {
                Some(projected) => {
                    and_others(farthest_first(&projected, size), images.len(), random)
                }
                None => (0..images.len()).collect(),
            };
            CoreSet {
                groups: chosen
                    .iter()
                    .filter_map(|&i| groups.get(images[i]).copied())
                    .collect(),
                patches: rows.select(Axis(0), &chosen),
            }
        });
        Self {
            blocks: blocks.collect(),
            worst: config.worst,
            faults: Vec::new(),
        }
    }

    /// The same core sets with the patches of some groups under other numbers, and without those of the rest.
    pub(crate) fn with_groups(&self, number: impl Fn(usize) -> Option<usize>) -> Self {
        let of_block = |core: &CoreSet| core.with_groups(&number);
        Self {
            blocks: self.blocks.iter().map(of_block).collect(),
            worst: self.worst,
            faults: self.faults.clone(),
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
        let images = self.distances_of_blocks(tokens, left_out)?;
        let images = images.iter();
        Ok(images
            .map(|blocks| PatchDistances::of_blocks(blocks, &tokens.parts, self.worst))
            .collect())
    }

    /// As [`PatchMemory::distances`], of each block: `[images][blocks][patches]`.
    pub(crate) fn distances_of_blocks(
        &self,
        tokens: &PatchTokens,
        left_out: Option<&[usize]>,
    ) -> Result<Vec<Vec<Vec<f32>>>, Error> {
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
            let blocks = tokens.blocks.iter().zip(&self.blocks).enumerate();
            blocks
                .map(|(number, (block, core))| {
                    let patches = block.index_axis(Axis(0), image);
                    let mut distances = nearest(patches, core, own);
                    if let Some(fault) = self.faults.get(number) {
                        fault.add_to(patches, &mut distances);
                    }
                    distances
                })
                .collect()
        };
        Ok((0..tokens.len()).into_par_iter().map(one).collect())
    }
}

impl PatchDistances {
    /// From the distances of each block; `parts`: patches of each part of the image, none where it is one part.
    fn of_blocks(blocks: &[Vec<f32>], parts: &[Vec<usize>], worst: usize) -> Self {
        let mut map = vec![0.0; blocks.first().map_or(0, Vec::len)];
        for block in blocks {
            for (sum, distance) in map.iter_mut().zip(block) {
                *sum += distance / blocks.len() as f32;
            }
        }
        let of_part = |part: &Vec<usize>| -> f64 {
            let worst_of_block = |block: &Vec<f32>| {
                let own = part.iter().filter_map(|&i| block.get(i).copied());
                worst_of(own.collect(), worst)
            };
            blocks.iter().map(worst_of_block).sum()
        };
        let largest = if parts.is_empty() {
            blocks
                .iter()
                .map(|block| worst_of(block.clone(), worst))
                .sum()
        } else {
            parts.iter().map(of_part).fold(0.0, f64::max)
        };
        Self {
            log_worst: largest.max(LEAST_DISTANCE).ln(),
            map,
        }
    }
}

/// The places of the largest distances, at most `count`.
pub(crate) fn worst_places(distances: &[f32], count: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..distances.len()).collect();
    places.sort_by(|&a, &b| distances[b].total_cmp(&distances[a]).then(a.cmp(&b)));
    places.truncate(count);
    places
}

/// Patches that are compared with the core set at a time: 14 MB of similarities.
const COMPARED: usize = 1024;

/// `1 - cosine` of each patch to the nearest of the core set that is not of the group `own`.
fn nearest(patches: ArrayView2<'_, f32>, core: &CoreSet, own: Option<usize>) -> Vec<f32> {
    let some = patches.axis_chunks_iter(Axis(0), COMPARED);
    some.flat_map(|some| nearest_of(some, core, own)).collect()
}

fn nearest_of(patches: ArrayView2<'_, f32>, core: &CoreSet, own: Option<usize>) -> Vec<f32> {
    let mut similarities = product(patches, core.patches.view());
    if let Some(own) = own {
        for mut column in similarities
            .columns_mut()
            .into_iter()
            .zip(&core.groups)
            .filter_map(|(column, group)| (*group == own).then_some(column))
        {
            // As far as can be: where there is no other, nothing else is known.
            column.fill(-1.0);
        }
    }
    similarities
        .rows()
        .into_iter()
        .map(|row| {
            let largest = row.as_slice().map(|row| {
                vectorised(
                    #[inline(always)]
                    || largest_of(row),
                )
            });
            1.0 - largest.unwrap_or(f32::NEG_INFINITY)
        })
        .collect()
}

/// The largest value, lane by lane: the compiler keeps the order of a single one.
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

#[cfg(test)]
mod tests {
    use defend_random::standard_normal;

    use super::*;

    #[test]
    fn a_core_set_takes_one_of_each_heap() {
        // Five heaps of 300 patches, far apart: five centres are one of each, whatever the number of projected channels.
        let mut rng = Rng::seed(1);
        let rows = Array3::from_shape_fn((150, 10, 12), |(image, patch, j)| {
            let noise = 0.01 * standard_normal(&mut rng) as f32;
            noise
                + if (image * 10 + patch) % 5 == j {
                    1.0
                } else {
                    0.0
                }
        });
        let tokens = PatchTokens::new(vec![rows.clone(), rows]).unwrap();
        let groups: Vec<usize> = (0..150).collect();
        let choose = |core, projected| {
            let config = PatchConfig {
                core,
                random: 3,
                projected,
                ..PatchConfig::default()
            };
            PatchMemory::choose(&tokens, &groups, &config, &mut Rng::seed(3))
        };
        for width in [16, 17, 64] {
            for core in choose(5, width).blocks() {
                let heap = |row: ndarray::ArrayView1<'_, f32>| row.iter().position(|v| *v > 0.5);
                let mut heaps: Vec<_> = core.patches.rows().into_iter().filter_map(heap).collect();
                heaps.sort_unstable();
                heaps.dedup();
                assert_eq!(heaps, [0, 1, 2, 3, 4], "{width} channels");
                // Three more at random.
                assert_eq!(core.groups.len(), 8);
            }
        }
        let all = choose(9999, 16);
        assert!(all.blocks().iter().all(|core| core.patches.nrows() == 1500));
    }

    #[test]
    fn an_image_in_parts_is_as_its_worst_part() {
        let mut rng = Rng::seed(2);
        let rows = Array3::from_shape_simple_fn((6, 8, 5), || standard_normal(&mut rng) as f32);
        let tokens = PatchTokens::new(vec![rows.clone(), rows]).unwrap();
        let config = PatchConfig {
            worst: 2,
            ..PatchConfig::default()
        };
        let groups: Vec<usize> = (0..6).collect();
        let memory = PatchMemory::choose(&tokens, &groups, &config, &mut Rng::seed(3));
        let part_of = [0, 1, 0, 1, 1, 0, 0, 1];
        let whole = memory.distances(&tokens, Some(&groups)).unwrap();
        let in_parts = tokens.clone().in_parts(&part_of).unwrap().select(&[4, 1]);
        let found = memory.distances(&in_parts, Some(&[4, 1])).unwrap();
        for (found, image) in found.iter().zip([4, 1]) {
            assert_eq!(found.map, whole[image].map);
            // Both blocks are the same, so the mean over them is each one's distance.
            let worst_two = |part: usize| {
                let of_part = (0..8).filter(|&i| part_of[i] == part);
                let mut values: Vec<f32> = of_part.map(|i| found.map[i]).collect();
                values.sort_by(f32::total_cmp);
                f64::from(values[3]) + f64::from(values[2])
            };
            let expected = worst_two(0).max(worst_two(1)).ln();
            assert!((found.log_worst - expected).abs() < 1e-6);
        }
        let one = tokens.clone().in_parts(&[3; 8]).unwrap();
        let one = memory.distances(&one, Some(&groups)).unwrap();
        assert_eq!(one, whole);
        let error = tokens.in_parts(&[0; 7]).unwrap_err().to_string();
        assert!(error.contains("[7]") && error.contains("[8]"), "{error}");
    }
}
