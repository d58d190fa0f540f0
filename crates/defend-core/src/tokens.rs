//! What the closed form takes from a teacher.

use candle_core::{DType, Tensor};
use defend_evidence::{Embeddings, PatchTokens};
use defend_nn::ops;
use defend_vit::{Encoder, Grid, Layer};
use ndarray::{Array2, Array3};

use crate::Error;
use crate::fit::PASS_BATCH;
use crate::tiles::Tiling;

/// What is wanted of a pass beside the embeddings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Patch tokens of the middle blocks: what is broken?
    pub(crate) patches: bool,
    /// What is around each patch: which object is novel?
    pub(crate) places: bool,
}

/// The blocks that are looked at: CLS tokens of the last two and the mean patch token of the last; patch tokens of the middle,
/// the 5th and 8th of 12, of an image in tiles where it is.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TokenBlocks {
    /// The last ones, ascending.
    last: Vec<usize>,
    /// The middle ones, ascending.
    middle: Vec<usize>,
    tiling: Option<Tiling>,
}

impl TokenBlocks {
    /// Of a network that gives all of its blocks.
    pub(crate) fn new(depth: usize) -> Self {
        Self::among(&(0..depth).collect::<Vec<_>>(), depth)
    }

    /// Of any network: of those blocks that it gives.
    pub(crate) fn of_encoder(encoder: &dyn Encoder) -> Self {
        Self::among(
            &encoder.available_blocks(),
            encoder.spec().architecture.depth,
        )
    }

    /// `available`: ascending.
    fn among(available: &[usize], depth: usize) -> Self {
        let last = depth.saturating_sub(2)..depth;
        // Rounded to the nearest block, counted from 1; of those that there are the nearest.
        let at = |twelfths: usize| {
            let wanted = ((2 * depth * twelfths + 12) / 24).clamp(1, depth.max(1)) - 1;
            let nearest = available.iter().min_by_key(|block| block.abs_diff(wanted));
            nearest.copied().unwrap_or(wanted)
        };
        let mut middle = vec![at(5), at(8)];
        middle.dedup();
        Self {
            last: last.filter(|block| available.contains(block)).collect(),
            middle,
            tiling: None,
        }
    }

    /// Of images in tiles.
    pub(crate) fn in_tiles(mut self, tiling: Option<Tiling>) -> Self {
        self.tiling = tiling;
        self
    }

    /// The tiles, where images are in some.
    pub(crate) fn tiling(&self) -> Option<&Tiling> {
        self.tiling.as_ref()
    }

    /// Numbers of the blocks behind an embedding, as a background names them.
    pub(crate) fn last(&self) -> &[usize] {
        &self.last
    }

    /// All blocks asked for, ascending.
    fn all(&self, with_patches: bool) -> Vec<usize> {
        let mut all = self.last.clone();
        if with_patches {
            all.extend(&self.middle);
        }
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Embeddings of a batch, and what else is asked for.
    pub(crate) fn embed(
        &self,
        teacher: &dyn Encoder,
        images: &Tensor,
        wanted: Wanted,
    ) -> Result<Embedded, Error> {
        let blocks = self.all(wanted.patches && self.tiling.is_none());
        let whole = self.tiling.map(|tiling| tiling.whole(images)).transpose()?;
        let whole = whole.as_ref().unwrap_or(images);
        let (layers, local) = if wanted.places {
            teacher.intermediates_and_local(whole, &blocks)?
        } else {
            (teacher.intermediates(whole, &blocks)?, None)
        };
        let layer = |block: &usize| layer_of(&layers, &blocks, *block);
        let mut parts = Vec::new();
        for block in &self.last {
            parts.push(matrix(&layer(block)?.cls)?);
        }
        if let Some(block) = self.last.last() {
            let patches = &layer(block)?.patches;
            parts.push(matrix(&patches.to_dtype(DType::F32)?.mean(1)?)?);
        }
        let places = match (wanted.places, self.last.first(), self.last.last()) {
            (true, Some(first), Some(last)) => {
                let places = match local {
                    Some(local) => surroundings(&local, &layer(first)?.patches)?,
                    None => layer(last)?.patches.clone(),
                };
                let places = match &self.tiling {
                    Some(tiling) => {
                        let under = Tensor::new(tiling.patches_of_whole(), places.device())?;
                        places.index_select(&under, 1)?
                    }
                    None => places,
                };
                Some(PatchTokens::new(vec![cube(&places)?])?)
            }
            _ => None,
        };
        let patches = match (wanted.patches, &self.tiling) {
            (false, _) => None,
            (true, None) => {
                let blocks = self.middle.iter().map(|block| cube(&layer(block)?.patches));
                Some(PatchTokens::new(blocks.collect::<Result<_, Error>>()?)?)
            }
            (true, Some(tiling)) => Some(self.patches_of_tiles(teacher, images, tiling)?),
        };
        Ok(Embedded {
            images: Embeddings::new(parts)?,
            patches,
            places,
        })
    }

    fn patches_of_tiles(
        &self,
        teacher: &dyn Encoder,
        images: &Tensor,
        tiling: &Tiling,
    ) -> Result<PatchTokens, Error> {
        let tiles = tiling.cut(images)?;
        let mut batches = vec![Vec::new(); self.middle.len()];
        for first in (0..tiles.dim(0)?).step_by(PASS_BATCH) {
            let some = tiles.narrow(0, first, PASS_BATCH.min(tiles.dim(0)? - first))?;
            let layers = teacher.intermediates(&some, &self.middle)?;
            for (block, batch) in self.middle.iter().zip(&mut batches) {
                let patches = &layer_of(&layers, &self.middle, *block)?.patches;
                batch.push(patches.to_dtype(DType::F32)?);
            }
        }
        let blocks = batches.iter().map(|batch| {
            let patches = tiling.stitch(&Tensor::cat(batch, 0)?)?;
            cube(&if tiling.per_position() {
                with_positions(&patches, tiling)?
            } else {
                patches
            })
        });
        self.in_parts(PatchTokens::new(blocks.collect::<Result<_, Error>>()?)?)
    }

    /// Patches of images in tiles as such.
    pub(crate) fn in_parts(&self, tokens: PatchTokens) -> Result<PatchTokens, Error> {
        Ok(match &self.tiling {
            Some(tiling) => tokens.in_parts(&tiling.tile_of_patches())?,
            None => tokens,
        })
    }

    /// Patches of an image: those of all tiles together where it is in some.
    pub(crate) fn grid(&self, teacher: &dyn Encoder) -> Grid {
        match &self.tiling {
            Some(tiling) => tiling.grid(),
            None => teacher.spec().architecture.grid(),
        }
    }

    /// Of `images` in a pass, how many are looked at together, so that a pass over tiles takes no more memory.
    pub(crate) fn images_of(&self, images: usize) -> usize {
        let tiles = self.tiling.map_or(1, |tiling| tiling.count());
        (images / tiles.max(1)).max(1)
    }
}

/// The layer of a block, of those that were asked for.
fn layer_of<'a>(layers: &'a [Layer], blocks: &[usize], block: usize) -> Result<&'a Layer, Error> {
    let found = blocks.iter().position(|b| *b == block);
    found
        .and_then(|i| layers.get(i))
        .ok_or_else(|| Error::Config {
            field: "teacher",
            value: format!("{} layers", layers.len()),
            expected: format!("one for each of the blocks {blocks:?}"),
        })
}

/// Patch tokens `[B, N, D]` with a channel for each tile that says which one they are from, `[B, N, D + tiles]`: distances within a
/// tile are halved, and those to patches of other tiles are a half more, which is farther than any patch of the same tile
/// whose cosine is not below 0.
fn with_positions(tokens: &Tensor, tiling: &Tiling) -> Result<Tensor, Error> {
    let (images, patches, _) = tokens.dims3()?;
    let tiles = tiling.count();
    let mut positions = vec![0f32; patches * tiles];
    for (row, tile) in positions
        .chunks_exact_mut(tiles)
        .zip(tiling.tile_of_patches())
    {
        row[tile] = 1.0;
    }
    let positions = Tensor::from_vec(positions, (1, patches, tiles), tokens.device())?;
    let positions = positions.broadcast_as((images, patches, tiles))?;
    Ok(Tensor::cat(
        &[&ops::l2_normalize(tokens)?, &positions.contiguous()?],
        2,
    )?)
}

/// Weight of a patch's own token beside its local CLS token, which weighs 1.
const OWN_TOKEN: f64 = 0.7;

/// What says of each patch what it shows: its local CLS token, which knows of objects, and its own token of the last but one block,
/// which knows where they end; `[B, N, 2 D]`.
fn surroundings(local: &Tensor, own: &Tensor) -> Result<Tensor, Error> {
    let unit = |tokens: &Tensor| ops::l2_normalize(&tokens.to_dtype(DType::F32)?);
    let own = (unit(own)? * OWN_TOKEN)?;
    Ok(Tensor::cat(&[unit(local)?, own], 2)?)
}

/// What was taken of a batch.
pub(crate) struct Embedded {
    pub(crate) images: Embeddings,
    pub(crate) patches: Option<PatchTokens>,
    /// What is around each patch: [`surroundings`], or patch tokens of the last block of a teacher without local CLS tokens.
    pub(crate) places: Option<PatchTokens>,
}

fn values(tensor: &Tensor) -> Result<Vec<f32>, Error> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

fn matrix(tensor: &Tensor) -> Result<Array2<f32>, Error> {
    Ok(
        Array2::from_shape_vec(tensor.dims2()?, values(tensor)?)
            .map_err(candle_core::Error::msg)?,
    )
}

fn cube(tensor: &Tensor) -> Result<Array3<f32>, Error> {
    Ok(
        Array3::from_shape_vec(tensor.dims3()?, values(tensor)?)
            .map_err(candle_core::Error::msg)?,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_by_depth() {
        let of = |depth| {
            let blocks = TokenBlocks::new(depth);
            (blocks.last, blocks.middle)
        };
        assert_eq!(of(12), (vec![10, 11], vec![4, 7]));
        assert_eq!(of(24), (vec![22, 23], vec![9, 15]));
        assert_eq!(of(4), (vec![2, 3], vec![1, 2]));
        assert_eq!(of(2), (vec![0, 1], vec![0]));
        assert_eq!(of(1), (vec![0], vec![0]));
        assert_eq!(TokenBlocks::new(4).all(true), [1, 2, 3]);
    }
}
