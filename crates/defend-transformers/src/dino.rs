//! DINOv2 without and with registers (Oquab et al., 2023; Darcet et al., 2023), as candle computes them.
//!
//! [`defend_vit::Vit`] reads the same weights and gives more: these are for comparison.

use candle_core::{DType, Device, Tensor};
use candle_nn::{Module, VarBuilder};
use candle_transformers::models::{dinov2, dinov2reg4};
use defend_vit::{Architecture, BackboneSpec, Encoder, Error, Layer, Normalization};

use crate::check::{check, each_image};
use crate::files::{ModelFiles, builder, named};

/// What candle's types have built in.
const IMAGE_SIZE: usize = 518;
const PATCH_SIZE: usize = 14;
const CLASSES: usize = 1000;
const CLASSES_WITH_REGISTERS: usize = 7806;

/// What both types are made of: a specification, and the tensors with a head that hands on the first channels of its `inputs`, since
/// candle's types show their CLS token through it alone.
fn prepared(
    files: &ModelFiles,
    [depth, width, heads]: [usize; 3],
    patch_size: usize,
    [classes, inputs]: [usize; 2],
    device: &Device,
) -> Result<(BackboneSpec, VarBuilder<'static>), Error> {
    if width > classes {
        return Err(Error::Config {
            origin: files.name().to_owned(),
            reason: format!(
                "width {width}, expected at most {classes}: candle's type shows no more of its CLS token"
            ),
        });
    }
    let architecture = Architecture {
        image_size: IMAGE_SIZE,
        patch_size,
        width,
        depth,
        heads,
        mlp_width: 4 * width,
        layer_scale: true,
        ..Architecture::vit_base()
    };
    let spec = BackboneSpec::new(architecture);
    let spec = named(spec, files.name(), Normalization::IMAGENET);
    spec.validate()?;
    let mut identity = vec![0f32; classes * inputs];
    for i in 0..width {
        identity[i * inputs + i] = 1.0;
    }
    let mut tensors = files.tensors(device)?;
    let head = Tensor::from_vec(identity, (classes, inputs), device)?;
    tensors.insert("head.weight".into(), head);
    let bias = Tensor::zeros(classes, DType::F32, device)?;
    tensors.insert("head.bias".into(), bias);
    Ok((spec, builder(tensors, device)))
}

/// CLS tokens of the last block, `[B, width]`, image by image.
fn cls_of(model: &dyn Module, images: &Tensor, width: usize) -> Result<Tensor, Error> {
    let shown = each_image(images, |image| Ok(model.forward(image)?))?;
    Ok(shown.narrow(1, 0, width)?.contiguous()?)
}

/// DINOv2 at 518 pixels: CLS and patch tokens of the last block. candle computes GELU by tanh and adds 1e-5 to the
/// variance in its LayerNorms, where DINOv2 has the exact GELU and 1e-6: values differ by some 1e-4.
pub struct DinoV2 {
    spec: BackboneSpec,
    model: dinov2::DinoVisionTransformer,
}

impl DinoV2 {
    /// Reads weights with the names of DINOv2's own files and timm's, with `depth` blocks of `width` channels and `heads` heads.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Config`] for more than 1,000 channels, [`Error::Damaged`], and [`Error::Candle`] for a tensor that is
    /// missing or does not fit.
    pub fn load(
        files: &ModelFiles,
        [depth, width, heads]: [usize; 3],
        device: &Device,
    ) -> Result<Self, Error> {
        let head = [CLASSES, 2 * width];
        let (spec, builder) = prepared(files, [depth, width, heads], PATCH_SIZE, head, device)?;
        Ok(Self {
            model: dinov2::DinoVisionTransformer::new(builder, depth, width, heads)?,
            spec,
        })
    }
}

impl Encoder for DinoV2 {
    fn spec(&self) -> &BackboneSpec {
        &self.spec
    }

    fn available_blocks(&self) -> Vec<usize> {
        vec![self.spec.architecture.depth - 1]
    }

    fn intermediates(&self, images: &Tensor, blocks: &[usize]) -> Result<Vec<Layer>, Error> {
        check(&self.spec, &self.available_blocks(), images, blocks)?;
        if blocks.is_empty() {
            return Ok(Vec::new());
        }
        let cls = cls_of(&self.model, images, self.spec.architecture.width)?;
        let patches = each_image(images, |image| {
            let found = self
                .model
                .get_intermediate_layers(image, blocks, false, false, true)?;
            Ok(found.get(0)?)
        })?;
        Ok(vec![Layer { cls, patches }])
    }
}

/// DINOv2 with four registers at 518 pixels: the CLS token of the last block. candle's type gives no patch tokens, so one patch, as
/// large as the image, stands for all: there are no maps.
pub struct DinoV2Registers {
    spec: BackboneSpec,
    model: dinov2reg4::DinoVisionTransformer,
}

impl DinoV2Registers {
    /// As [`DinoV2::load`], for up to 7,806 channels.
    ///
    /// # Errors
    /// As [`DinoV2::load`].
    pub fn load(
        files: &ModelFiles,
        [depth, width, heads]: [usize; 3],
        device: &Device,
    ) -> Result<Self, Error> {
        let head = [CLASSES_WITH_REGISTERS, width];
        let (mut spec, builder) = prepared(files, [depth, width, heads], IMAGE_SIZE, head, device)?;
        spec.architecture.registers = 4;
        Ok(Self {
            model: dinov2reg4::DinoVisionTransformer::new(builder, depth, width, heads)?,
            spec,
        })
    }
}

impl Encoder for DinoV2Registers {
    fn spec(&self) -> &BackboneSpec {
        &self.spec
    }

    fn available_blocks(&self) -> Vec<usize> {
        vec![self.spec.architecture.depth - 1]
    }

    fn intermediates(&self, images: &Tensor, blocks: &[usize]) -> Result<Vec<Layer>, Error> {
        check(&self.spec, &self.available_blocks(), images, blocks)?;
        if blocks.is_empty() {
            return Ok(Vec::new());
        }
        let cls = cls_of(&self.model, images, self.spec.architecture.width)?;
        Ok(vec![Layer {
            patches: cls.unsqueeze(1)?,
            cls,
        }])
    }
}
