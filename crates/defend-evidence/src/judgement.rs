//! What is said of an image.

use serde::{Deserialize, Serialize};

use crate::{ClosedForm, Embeddings, Error, PatchTokens};

/// One piece of evidence on an image.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Weighed {
    /// Standard deviations above the mean of the normal images' left-out values.
    pub z: f64,
    /// Its weight in the sum.
    pub weight: f64,
}

/// What the evidence says of an image.
#[derive(Debug, Clone, PartialEq)]
pub struct Judgement {
    /// Sum of the weighed pieces, larger for more novel.
    pub score: f64,
    /// Is it explained by the normal images?
    pub posterior: Weighed,
    /// Is it more like them than like images in general? `None` where that has no weight.
    pub contrast: Option<Weighed>,
    /// Is some small part unlike anything normal? `None` where that has no weight.
    pub patches: Option<Weighed>,
    /// Is it like a known abnormal image? 0 or more; `None` where none are known.
    pub known: Option<Weighed>,
    /// The kept images that explain it most, leaders of their groups, with their share, largest first.
    pub explained_by: Vec<(usize, f64)>,
    /// Distance of each patch to the nearest normal one, where patches were given.
    pub map: Option<Vec<f32>>,
}

impl ClosedForm {
    /// Judges images. Where [`ClosedForm::patch_weight`] is not zero and there is a patch memory, `patches` of the same images are
    /// needed. For maps see [`ClosedForm::maps`].
    ///
    /// # Errors
    /// [`Error::Shape`] for other widths or another number of images, [`Error::Empty`] without the patches that are needed.
    pub fn evaluate(
        &self,
        images: &Embeddings,
        patches: Option<&PatchTokens>,
    ) -> Result<Vec<Judgement>, Error> {
        self.normal.check_widths(images, "the embeddings")?;
        if let Some(patches) = patches
            && patches.len() != images.len()
        {
            return Err(Error::Shape {
                what: "patch tokens".into(),
                found: vec![patches.len(), patches.patches()],
                expected: vec![images.len(), patches.patches()],
            });
        }
        let distances = match (patches, &self.patches) {
            (Some(tokens), Some(known)) => {
                Some((known.memory.distances(tokens, None)?, known.scale))
            }
            (None, Some(_)) if self.patch_weight > 0.0 => {
                return Err(Error::Empty {
                    what: "patch tokens",
                });
            }
            _ => None,
        };
        let explained = self
            .posterior
            .evaluate(images.phi(self.config.posterior.first_part).view())?;
        let contrasts = self.contrast.as_ref().map(|weighed| {
            let values = weighed
                .contrast
                .evaluate(images.features(self.config.contrast.parts).view());
            let of = |value| Weighed {
                z: weighed.scale.z(value),
                weight: weighed.weight,
            };
            values.into_iter().map(of).collect::<Vec<_>>()
        });
        let known = self
            .known
            .as_ref()
            .map(|known| known.evaluate(images.features(usize::MAX).view(), self.config.known));
        let judgements = explained.into_iter().enumerate().map(|(i, explained)| {
            let posterior = Weighed {
                z: self.scale.z(explained.log_variance),
                weight: 1.0,
            };
            let contrast = contrasts.as_ref().and_then(|all| all.get(i)).copied();
            let found = distances
                .as_ref()
                .and_then(|(all, scale)| Some((all.get(i)?, scale)));
            let patches = found
                .filter(|_| self.patch_weight > 0.0)
                .map(|(distances, scale)| Weighed {
                    z: scale.z(distances.log_worst),
                    weight: self.patch_weight,
                });
            let known = known.as_ref().and_then(|all| all.get(i)).copied();
            let pieces = [Some(posterior), contrast, patches, known];
            let leader = |(group, share)| Some((*self.groups.leaders.get(group)?, share));
            Judgement {
                score: pieces
                    .into_iter()
                    .flatten()
                    .map(|piece| piece.weight * piece.z)
                    .sum(),
                posterior,
                contrast,
                patches,
                known,
                explained_by: explained.shares.into_iter().filter_map(leader).collect(),
                map: found.map(|(distances, _)| distances.map.clone()),
            }
        });
        Ok(judgements.collect())
    }
}
