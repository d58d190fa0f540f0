//! The student stage in closed form.

use std::sync::Arc;

use candle_core::Tensor;
use defend_data::ContentHash;
use defend_evidence::{ClosedForm, Embeddings};
use defend_vit::Encoder;

use crate::normal_images::NormalImage;
use crate::novelty::{Explanation, NearestNormal};
use crate::tokens::{Embedded, TokenBlocks, Wanted};
use crate::{Error, Novelty, PatchMap};

/// A teacher, and what its tokens of the normal images say.
pub(crate) struct ClosedFormStudent {
    pub(crate) teacher: Arc<dyn Encoder>,
    pub(crate) blocks: TokenBlocks,
    pub(crate) evidence: ClosedForm,
    /// The kept normal images.
    pub(crate) normals: Vec<NormalImage>,
    /// Hashes of others that were fitted on: of very many images not all are kept.
    pub(crate) others: Vec<ContentHash>,
}

impl ClosedFormStudent {
    /// Scores without verdicts, and the embeddings behind them.
    pub(crate) fn score(
        &self,
        images: &Tensor,
        with_maps: bool,
    ) -> Result<(Vec<Novelty>, Embeddings), Error> {
        let wanted = self.wanted(with_maps);
        let embedded = self.embed(images, wanted)?;
        let novelties = self.judge(&embedded, with_maps)?;
        Ok((novelties, embedded.images))
    }

    /// What scores, and maps if asked for, need of a pass.
    pub(crate) fn wanted(&self, with_maps: bool) -> Wanted {
        let (evidence, share) = (&self.evidence, self.evidence.patch_share());
        let scored = evidence.patch_weight() > 0.0 || (with_maps && share > 0.0);
        Wanted {
            patches: evidence.memory().is_some() && scored,
            places: evidence.objects().is_some() && with_maps && share < 1.0,
        }
    }

    /// The teacher's pass over a batch.
    pub(crate) fn embed(&self, images: &Tensor, wanted: Wanted) -> Result<Embedded, Error> {
        self.blocks.embed(&*self.teacher, images, wanted)
    }

    /// Scores without verdicts of images that are embedded.
    pub(crate) fn judge(
        &self,
        embedded: &Embedded,
        with_maps: bool,
    ) -> Result<Vec<Novelty>, Error> {
        let patches = embedded.patches.as_ref();
        let patches = patches.filter(|_| self.wanted(with_maps).patches);
        let judgements = self.evidence.evaluate(&embedded.images, patches)?;
        let mut maps = vec![None; judgements.len()];
        if with_maps {
            maps = self.evidence.maps(&judgements, embedded.places.as_ref())?;
        }
        let grid = self.blocks.grid(&*self.teacher);
        let judged = judgements.into_iter().zip(maps);
        let novelties = judged.map(|(judgement, map)| Novelty {
            score: judgement.score,
            verdict: None,
            p_value: None,
            map: map.map(|values| PatchMap { grid, values }),
            explanation: Some(Explanation {
                posterior: judgement.posterior,
                contrast: judgement.contrast,
                patches: judgement.patches,
                known: judgement.known,
                nearest: judgement
                    .explained_by
                    .into_iter()
                    .filter_map(|near| self.nearest(near))
                    .collect(),
            }),
        });
        Ok(novelties.collect())
    }

    /// Takes other evidence, whose kept images are numbered as `all` are.
    pub(crate) fn replace(&mut self, evidence: ClosedForm, all: Vec<NormalImage>) {
        let mut places: Vec<Option<NormalImage>> = all.into_iter().map(Some).collect();
        let kept = evidence.kept().iter();
        let kept = kept.filter_map(|&i| places.get_mut(i)?.take());
        self.normals = kept.collect();
        let left = places.into_iter().flatten();
        self.others.extend(left.filter_map(|image| image.hash));
        self.evidence = evidence;
    }

    fn nearest(&self, (image, share): (usize, f64)) -> Option<NearestNormal> {
        let name = self.normals.get(image)?.name.clone();
        Some(NearestNormal { name, share })
    }
}
