//! The teacher's pass over the normal images.

use defend_evidence::{Embeddings, PatchTokens};
use defend_vit::{Encoder, ImageSource};
use ndarray::{Array3, Axis};

use crate::fit::PASS_BATCH;
use crate::observer::{Event, Observer, Stage};
use crate::tokens::{Embedded, TokenBlocks};
use crate::{Error, Pictures};

/// Of so few images the patch tokens stay in memory, 300 KB each for ViT-Ti; of more, those that are wanted are computed
/// once more.
const KEPT_PATCH_IMAGES: usize = 512;

/// Tokens of the normal images, computed once.
pub(crate) struct Normals<'a> {
    teacher: &'a dyn Encoder,
    blocks: &'a TokenBlocks,
    pictures: &'a Pictures,
    patches: Vec<PatchTokens>,
}

impl<'a> Normals<'a> {
    pub(crate) fn new(
        teacher: &'a dyn Encoder,
        blocks: &'a TokenBlocks,
        pictures: &'a Pictures,
    ) -> Self {
        Self {
            teacher,
            blocks,
            pictures,
            patches: Vec::new(),
        }
    }

    /// Embeddings of all images.
    pub(crate) fn embeddings(&mut self, observer: &mut dyn Observer) -> Result<Embeddings, Error> {
        let keep = self.pictures.len() <= KEPT_PATCH_IMAGES;
        let all: Vec<usize> = (0..self.pictures.len()).collect();
        let (mut batches, mut patches) = (Vec::new(), Vec::new());
        self.pass(&all, keep, Stage::Embed, observer, |embedded| {
            batches.push(embedded.images);
            patches.extend(embedded.patches);
            Ok(())
        })?;
        self.patches = patches;
        Ok(Embeddings::joined(&batches)?)
    }

    /// Patch tokens of some images, in the order asked for.
    pub(crate) fn patches(
        &self,
        images: &[usize],
        observer: &mut dyn Observer,
    ) -> Result<PatchTokens, Error> {
        let (mut again, mut rows) = (Vec::new(), images.to_vec());
        if self.patches.is_empty() {
            self.pass(images, true, Stage::Patches, observer, |embedded| {
                again.extend(embedded.patches);
                Ok(())
            })?;
            rows = (0..images.len()).collect();
        }
        let patches = if self.patches.is_empty() {
            &again
        } else {
            &self.patches
        };
        let blocks = patches.first().map_or(0, |tokens| tokens.blocks().len());
        let join = |block: usize| -> Result<Array3<f32>, Error> {
            let of_image = |&row: &usize| {
                let (batch, at) = (row / PASS_BATCH, row % PASS_BATCH);
                let tokens = patches.get(batch)?.blocks().get(block)?;
                Some(tokens.index_axis(Axis(0), at))
            };
            let views: Vec<_> = rows.iter().filter_map(of_image).collect();
            Ok(ndarray::stack(Axis(0), &views).map_err(candle_core::Error::msg)?)
        };
        let blocks = (0..blocks).map(join).collect::<Result<Vec<_>, Error>>()?;
        Ok(PatchTokens::new(blocks)?)
    }

    /// Hands over what is taken of each batch; features that are not finite name their image.
    pub(crate) fn pass(
        &self,
        images: &[usize],
        with_patches: bool,
        stage: Stage,
        observer: &mut dyn Observer,
        mut on_batch: impl FnMut(Embedded) -> Result<(), Error>,
    ) -> Result<(), Error> {
        observer.on(&Event::Started {
            stage,
            images: images.len() as u64,
        });
        self.pictures.announce(images);
        for batch in images.chunks(PASS_BATCH) {
            let embedded =
                self.blocks
                    .embed(self.teacher, &self.pictures.images(batch)?, with_patches);
            on_batch(embedded.map_err(|error| {
                match error {
                    Error::Evidence(defend_evidence::Error::NotFinite { image, .. }) => {
                        Error::NonFiniteFeatures {
                            name: batch
                                .get(image)
                                .map_or_else(String::new, |&i| self.pictures.name(i)),
                        }
                    }
                    other => other,
                }
            })?)?;
            observer.on(&Event::Advanced {
                images: batch.len() as u64,
                loss: None,
            });
        }
        observer.on(&Event::Finished { stage });
        Ok(())
    }
}
