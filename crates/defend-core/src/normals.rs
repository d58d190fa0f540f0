//! The teacher's pass over the normal images.

use defend_evidence::{Embeddings, PatchTokens};
use defend_vit::{Encoder, ImageSource};
use ndarray::{Array3, Axis};

use crate::fit::PASS_BATCH;
use crate::observer::{Event, Observer, Stage, advance};
use crate::tokens::{Embedded, TokenBlocks, Wanted};
use crate::{Error, ResizedImages};

/// Of so few images the patch tokens stay in memory, 300 KB each for ViT-Ti; of more, those that are wanted are computed
/// once more.
const KEPT_PATCH_IMAGES: usize = 512;

/// Tokens of the normal images, computed once.
pub(crate) struct Normals<'a> {
    teacher: &'a dyn Encoder,
    blocks: &'a TokenBlocks,
    images: &'a ResizedImages,
    patches: Vec<PatchTokens>,
    /// The batch and row of each image in `patches`.
    order: Vec<usize>,
    places: Option<(Vec<usize>, PatchTokens)>,
}

impl<'a> Normals<'a> {
    pub(crate) fn new(
        teacher: &'a dyn Encoder,
        blocks: &'a TokenBlocks,
        images: &'a ResizedImages,
    ) -> Self {
        Self {
            teacher,
            blocks,
            images,
            patches: Vec::new(),
            order: Vec::new(),
            places: None,
        }
    }

    pub(crate) fn teacher(&self) -> &dyn Encoder {
        self.teacher
    }

    /// Images that are looked at together.
    fn batch_size(&self) -> usize {
        self.blocks.images_of(PASS_BATCH)
    }

    pub(crate) fn blocks(&self) -> &TokenBlocks {
        self.blocks
    }

    /// Embeddings of all images; what is around the patches of `looked_at` of them is kept.
    pub(crate) fn embeddings(
        &mut self,
        looked_at: usize,
        observer: &mut dyn Observer,
    ) -> Result<Embeddings, Error> {
        let total = self.images.len();
        // Tiles cost a pass each, and whether they count shows only when the images are known.
        let keep = total <= KEPT_PATCH_IMAGES && self.blocks.tiling().is_none();
        // Evenly spread, so that they are of different bursts; they come first, in batches of their own as far as possible.
        let chosen: Vec<usize> = (0..looked_at.min(total))
            .map(|i| i * total / looked_at.min(total))
            .collect();
        let others = (0..total).filter(|image| chosen.binary_search(image).is_err());
        let order: Vec<usize> = chosen.iter().copied().chain(others).collect();
        let (mut batches, mut patches, mut places) = (Vec::new(), Vec::new(), Vec::new());
        let wanted = |first: usize| Wanted {
            patches: keep,
            places: first < chosen.len(),
        };
        self.pass(&order, wanted, Stage::Embed, observer, |embedded| {
            batches.push(embedded.images);
            patches.extend(embedded.patches);
            places.extend(embedded.places);
            Ok(())
        })?;
        self.patches = patches;
        let mut place_of = vec![0; total];
        for (place, &image) in order.iter().enumerate() {
            place_of[image] = place;
        }
        if !places.is_empty() {
            let rows: Vec<usize> = (0..chosen.len()).collect();
            self.places = Some((chosen, rows_of(&places, &rows, self.batch_size())?));
        }
        let embeddings = Embeddings::joined(&batches)?.select(&place_of);
        self.order = place_of;
        Ok(embeddings)
    }

    /// Embeddings of all images, where nothing else of them is wanted.
    pub(crate) fn only_embeddings(&self, observer: &mut dyn Observer) -> Result<Embeddings, Error> {
        let all: Vec<usize> = (0..self.images.len()).collect();
        let mut batches = Vec::new();
        self.pass(
            &all,
            |_| Wanted::default(),
            Stage::Embed,
            observer,
            |embedded| {
                batches.push(embedded.images);
                Ok(())
            },
        )?;
        Ok(Embeddings::joined(&batches)?)
    }

    /// The images whose surroundings of patches are kept, and these.
    pub(crate) fn places(&self) -> Option<(&[usize], &PatchTokens)> {
        self.places
            .as_ref()
            .map(|(images, places)| (images.as_slice(), places))
    }

    /// Patch tokens of some images, in the order asked for.
    pub(crate) fn patches(
        &self,
        images: &[usize],
        observer: &mut dyn Observer,
    ) -> Result<PatchTokens, Error> {
        if !self.patches.is_empty() {
            let places = images.iter().filter_map(|&i| self.order.get(i).copied());
            let places: Vec<usize> = places.collect();
            return self
                .blocks
                .in_parts(rows_of(&self.patches, &places, self.batch_size())?);
        }
        let (mut again, wanted) = (
            Vec::new(),
            Wanted {
                patches: true,
                places: false,
            },
        );
        self.pass(
            images,
            |_| wanted,
            Stage::Patches,
            observer,
            |embedded| {
                again.extend(embedded.patches);
                Ok(())
            },
        )?;
        let rows: Vec<usize> = (0..images.len()).collect();
        self.blocks
            .in_parts(rows_of(&again, &rows, self.batch_size())?)
    }

    /// Hands over what is taken of each batch; `wanted` of the one that begins at a place in `images`. Features that are not finite
    /// name their image.
    pub(crate) fn pass(
        &self,
        images: &[usize],
        wanted: impl Fn(usize) -> Wanted,
        stage: Stage,
        observer: &mut dyn Observer,
        mut on_batch: impl FnMut(Embedded) -> Result<(), Error>,
    ) -> Result<(), Error> {
        observer.on(&Event::Started {
            stage,
            images: images.len() as u64,
        });
        self.images.prefetch(images);
        for (number, batch) in images.chunks(self.batch_size()).enumerate() {
            let embedded = self.blocks.embed(
                self.teacher,
                &self.images.images(batch)?,
                wanted(number * self.batch_size()),
            );
            let name = |image: usize| {
                let image = batch.get(image);
                image.map_or_else(String::new, |&i| self.images.name(i))
            };
            on_batch(embedded.map_err(|error| error.naming(name))?)?;
            advance(observer, batch.len())?;
        }
        observer.on(&Event::Finished { stage });
        Ok(())
    }
}

/// Rows of batches of `size` images, in the order asked for.
fn rows_of(batches: &[PatchTokens], rows: &[usize], size: usize) -> Result<PatchTokens, Error> {
    let blocks = batches.first().map_or(0, |tokens| tokens.blocks().len());
    let join = |block: usize| -> Result<Array3<f32>, Error> {
        let of_image = |&row: &usize| {
            let (batch, at) = (row / size, row % size);
            let tokens = batches.get(batch)?.blocks().get(block)?;
            Some(tokens.index_axis(Axis(0), at))
        };
        let views: Vec<_> = rows.iter().filter_map(of_image).collect();
        Ok(ndarray::stack(Axis(0), &views).map_err(candle_core::Error::msg)?)
    };
    let blocks = (0..blocks).map(join).collect::<Result<Vec<_>, Error>>()?;
    Ok(PatchTokens::new(blocks)?)
}
