//! A teacher that also shows what the student's earlier blocks are to give.

use defend_core::Tensor;
use defend_core::vit::{Backbone, BackboneSpec, Encoder, Error, Features, Layer, TokenSet, Vit};

/// The teacher, with the last two of its blocks and some earlier ones among its layers.
pub(crate) struct Guide {
    teacher: Vit,
    /// Which of the teacher's intermediates are shown, last block first.
    shown: Vec<usize>,
}

impl Guide {
    /// `blocks`: the earlier blocks, ascending, numbers from 0.
    pub(crate) fn new(teacher: Vit, blocks: &[usize]) -> Result<Self, Error> {
        let last = teacher.spec().architecture.depth - 1;
        let earliest = blocks.iter().copied().min().unwrap_or(last - 1);
        let shown = std::iter::once(last - 1).chain(blocks.iter().rev().copied());
        Ok(Self {
            teacher: teacher.with_layers(last - earliest + 1)?,
            shown: shown.map(|block| last - 1 - block).collect(),
        })
    }

    fn choose(&self, mut features: Features) -> Features {
        let layers = &features.intermediates;
        let shown = self.shown.iter().filter_map(|&i| layers.get(i).cloned());
        features.intermediates = shown.collect();
        features
    }
}

impl Encoder for Guide {
    fn spec(&self) -> &BackboneSpec {
        self.teacher.spec()
    }

    fn intermediates(&self, images: &Tensor, blocks: &[usize]) -> Result<Vec<Layer>, Error> {
        self.teacher.intermediates(images, blocks)
    }
}

impl Backbone for Guide {
    fn features(&self, images: &Tensor) -> Result<Features, Error> {
        Ok(self.choose(self.teacher.features(images)?))
    }

    fn features_masked(&self, images: &Tensor, keep: &TokenSet) -> Result<Features, Error> {
        Ok(self.choose(self.teacher.features_masked(images, keep)?))
    }
}
