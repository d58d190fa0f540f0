//! The layers of a backbone that teacher and student are compared at (Table 1a).

use candle_core::Tensor;
use defend_vit::{Features, TokenSet};

use crate::Error;

/// Tokens of the compared layers, the last layer first.
pub(crate) struct Layers {
    /// `[B, L, N, D]`.
    pub(crate) patches: Tensor,
    /// `[B, L, D]`.
    pub(crate) cls: Tensor,
}

impl Layers {
    /// The last `count` layers.
    pub(crate) fn from_features(features: &Features, count: usize) -> Result<Self, Error> {
        let last = std::iter::once((&features.patches, &features.cls));
        let earlier = features.intermediates.iter();
        let (patches, cls): (Vec<&Tensor>, Vec<&Tensor>) = last
            .chain(earlier.map(|layer| (&layer.patches, &layer.cls)))
            .take(count)
            .unzip();
        if count == 0 || patches.len() < count {
            return Err(Error::Config {
                field: "layers",
                value: count.to_string(),
                expected: "at least 1, and no more than the layers in the features of teacher and student",
            });
        }
        Ok(Self {
            patches: Tensor::stack(&patches, 1)?,
            cls: Tensor::stack(&cls, 1)?,
        })
    }

    /// The kept patches of `[B, L, N, D]`: `[B, L, M, D]`.
    pub(crate) fn keep(patches: &Tensor, keep: &TokenSet) -> Result<Tensor, Error> {
        let layers = (0..patches.dim(1)?)
            .map(|layer| {
                let patches = patches.narrow(1, layer, 1)?.squeeze(1)?;
                Ok(keep.gather(&patches.contiguous()?)?)
            })
            .collect::<Result<Vec<_>, Error>>()?;
        Ok(Tensor::stack(&layers, 1)?)
    }
}
