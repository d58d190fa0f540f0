//! The same backbone with something changed.

use candle_core::{DType, Device, Tensor};

use crate::assembly::in_dtype;
use crate::pos_embed::Bicubic;
use crate::{BackboneSpec, ComputePrecision, Error, TrainScope, Vit, Weights, pos_embed};

impl Vit {
    /// The same backbone with the last `layers` layers in its features.
    ///
    /// # Errors
    /// [`Error::Config`] for none or more than there are blocks.
    pub fn with_layers(mut self, layers: usize) -> Result<Self, Error> {
        self.spec.layers = layers;
        self.spec.validate()?;
        Ok(self)
    }

    /// The same architecture and values with another part trained; nothing is shared with `self`.
    ///
    /// # Errors
    /// As [`Vit::load`].
    pub fn copy(&self, scope: TrainScope) -> Result<Self, Error> {
        self.copy_to(scope, self.pos_embed.device())
    }

    /// As [`Vit::copy`], on another device.
    ///
    /// # Errors
    /// As [`Vit::load`].
    pub fn copy_to(&self, scope: TrainScope, device: &Device) -> Result<Self, Error> {
        self.changed(self.spec.clone(), scope, device, |_, tensor| tensor.copy())
    }

    /// A shallower backbone of some of this one's blocks, everything trainable: the start of a distillation
    /// into fewer blocks. Nothing is shared with `self`.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] for a block that does not exist; [`Error::Config`] without any.
    pub fn with_blocks(&self, blocks: &[usize], name: &str) -> Result<Self, Error> {
        let state = self.state_dict()?;
        let mut spec = self.spec.clone();
        name.clone_into(&mut spec.name);
        spec.architecture.depth = blocks.len();
        Self::build(
            spec,
            TrainScope::All,
            0.0,
            self.pos_embed.device(),
            &mut |name, shape| {
                let source = match name
                    .strip_prefix("blocks.")
                    .and_then(|rest| rest.split_once('.'))
                {
                    Some((index, rest)) => {
                        let index = index.parse().ok().and_then(|i: usize| blocks.get(i));
                        format!("blocks.{}.{rest}", index.copied().unwrap_or(usize::MAX))
                    }
                    None => name.to_owned(),
                };
                let tensor = state.get(&source).ok_or_else(|| Error::MissingTensor {
                    origin: self.spec.name.clone(),
                    name: source,
                    expected: shape.to_vec(),
                })?;
                Ok(tensor.copy()?)
            },
        )
    }

    /// A copy for images of another size: the positional embedding is resized once, as every pass at that
    /// size would do, and the spec says the new size. Nothing is shared with `self`.
    ///
    /// # Errors
    /// [`Error::Config`] for a size that is no multiple of the patch size.
    pub fn resized(&self, image_size: usize, scope: TrainScope) -> Result<Self, Error> {
        let mut spec = self.spec.clone();
        spec.architecture.image_size = image_size;
        spec.validate()?;
        let (from, to) = (self.spec.architecture.grid(), spec.architecture.grid());
        let first = self.spec.architecture.first_patch_position();
        let all = self.pos_embed.detach().squeeze(0)?;
        let patches = all.narrow(0, first, from.patches())?;
        let patches = pos_embed::resize(&patches, from, to, Bicubic::new(&spec.architecture))?;
        let positions = Tensor::cat(&[all.narrow(0, 0, first)?, patches], 0)?.unsqueeze(0)?;
        self.changed(spec, scope, all.device(), |name, tensor| match name {
            "pos_embed" => Ok(positions.clone()),
            _ => tensor.copy(),
        })
    }

    /// A frozen copy that computes in this way. In `bf16` all its weights are rounded, for good.
    ///
    /// # Errors
    /// As [`Vit::load`].
    pub fn with_compute_precision(
        &self,
        compute_precision: ComputePrecision,
    ) -> Result<Self, Error> {
        self.to_dtype(match compute_precision {
            ComputePrecision::F32 => DType::F32,
            ComputePrecision::Bf16 => DType::BF16,
        })
    }

    /// A frozen copy in another floating-point type. On the CPU the tensors stay `f32`: weights are rounded to `dtype`, and
    /// with `BF16` the blocks compute as [`ComputePrecision::Bf16`] says.
    ///
    /// # Errors
    /// [`Error::Candle`] for a type that is not floating-point on this device.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self, Error> {
        let device = self.pos_embed.device();
        let mut spec = self.spec.clone();
        spec.compute_precision = match dtype {
            DType::BF16 => ComputePrecision::Bf16,
            _ => ComputePrecision::F32,
        };
        self.changed(spec, TrainScope::Frozen, device, |_, tensor| {
            in_dtype(&tensor, dtype)
        })
    }

    /// A copy with another spec and changed parameters.
    fn changed(
        &self,
        spec: BackboneSpec,
        scope: TrainScope,
        device: &Device,
        change: impl Fn(&str, Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Self, Error> {
        let tensors = self
            .state_dict()?
            .into_iter()
            .map(|(name, tensor)| {
                let tensor = change(&name, tensor)?;
                Ok((name, tensor))
            })
            .collect::<Result<_, Error>>()?;
        let weights = Weights::from_tensors(tensors, &self.spec.name);
        Self::load(spec, weights, scope, device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Architecture, Backbone, Encoder};
    use defend_nn::Rng;
    use defend_testing::{assert_close, largest};

    fn vit() -> Vit {
        let spec = BackboneSpec::new(Architecture {
            image_size: 32,
            patch_size: 8,
            width: 16,
            depth: 2,
            heads: 2,
            mlp_width: 32,
            ..Architecture::vit_tiny()
        });
        Vit::random(spec, 0.0, &mut Rng::seed(1), &Device::Cpu).unwrap()
    }

    fn images(side: usize) -> Tensor {
        let values: Vec<f32> = (0..3 * side * side)
            .map(|i| (i as f32 * 0.1).sin())
            .collect();
        Tensor::from_vec(values, (1, 3, side, side), &Device::Cpu).unwrap()
    }

    #[test]
    fn a_resized_backbone_gives_what_resizing_in_each_pass_gives() {
        let (vit, images) = (vit(), images(48));
        let resized = vit.resized(48, TrainScope::Frozen).unwrap();
        assert_eq!(resized.spec().architecture.grid().patches(), 36);
        let (found, expected) = (
            resized.features(&images).unwrap(),
            vit.features(&images).unwrap(),
        );
        assert_close(&found.patches, &expected.patches, 1e-6, "patches");
        assert!(vit.resized(44, TrainScope::Frozen).is_err());
    }

    #[test]
    fn half_precision_rounds_and_keeps_f32_tensors() {
        let (vit, images) = (vit(), images(32));
        let expected = vit.features(&images).unwrap().patches;
        for (half, allowed) in [(DType::F16, 2e-3), (DType::BF16, 2e-2)] {
            let rounded = vit.to_dtype(half).unwrap();
            let found = rounded.features(&images).unwrap().patches;
            assert_eq!(found.dtype(), DType::F32);
            assert_close(&found, &expected, allowed, "patches");
            assert!(largest(&(&found - &expected).unwrap()) > 0.0, "not rounded");
            // A file, and another fit's folder of features, know how it was rounded.
            let json = serde_json::to_string(rounded.spec()).unwrap();
            assert_eq!(json.contains("bf16"), half == DType::BF16);
            assert_eq!(
                serde_json::from_str::<BackboneSpec>(&json).unwrap(),
                *rounded.spec()
            );
            let mut spec = rounded.spec().clone();
            spec.compute_precision = ComputePrecision::F32;
            let weights = Weights::from_tensors(rounded.state_dict().unwrap(), "rounded");
            let plain = Vit::load(spec, weights, TrainScope::Frozen, &Device::Cpu).unwrap();
            let [a, b] = [&rounded, &plain].map(|vit| crate::weights_hash(vit).unwrap());
            assert_eq!(a == b, half == DType::F16);
            // Training is in f32.
            let trained = rounded.copy(TrainScope::All).unwrap();
            assert_eq!(trained.spec().compute_precision, ComputePrecision::F32);
        }
    }
}
