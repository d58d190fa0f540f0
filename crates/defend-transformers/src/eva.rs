//! EVA-02 (Fang et al., 2023).

use candle_core::{DType, Device, Tensor};
use candle_nn::{LayerNorm, Module, layer_norm};
use candle_transformers::models::eva2::EVA2VisionTransformer;
use defend_vit::{Architecture, BackboneSpec, Encoder, Error, Layer};

use crate::check::{check, each_image};
use crate::files::{CLIP, ModelFiles, builder, named};

/// What candle's type has built in.
const IMAGE_SIZE: usize = 448;
const PATCH_SIZE: usize = 14;
const CLASSES: usize = 1000;
/// Channels of a head, for which its rotary embedding is made.
const HEAD_WIDTH: usize = 64;
/// Added to the variance in its LayerNorms.
const EPS: f64 = 1e-6;

/// EVA-02 at 448 pixels with patches of 14: patch tokens of every block after the last LayerNorm, and their mean as its classifier
/// takes it (averaged, then normalised). candle's type does not give the CLS token.
pub struct Eva02 {
    spec: BackboneSpec,
    model: EVA2VisionTransformer,
    norm: LayerNorm,
}

impl Eva02 {
    /// Reads weights with the names of timm's `eva02_*_patch14_448` models whose queries, keys and values are apart, such as
    /// `eva02_base_patch14_448.mim_in22k_ft_in22k_in1k`, with `depth` blocks of `width` channels; 12 and 768 for the base model, 24 and
    /// 1024 for the large one.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Config`], [`Error::Damaged`], and [`Error::Candle`] for a tensor that is missing or does not fit.
    pub fn load(
        files: &ModelFiles,
        depth: usize,
        width: usize,
        device: &Device,
    ) -> Result<Self, Error> {
        let architecture = Architecture {
            image_size: IMAGE_SIZE,
            patch_size: PATCH_SIZE,
            width,
            depth,
            heads: width / HEAD_WIDTH,
            mlp_width: width * 4 * 2 / 3,
            layer_norm_eps: EPS,
            ..Architecture::vit_base()
        };
        let spec = named(BackboneSpec::new(architecture), files.name(), CLIP);
        spec.validate()?;
        let mut tensors = files.tensors(device)?;
        // Where a checkpoint has its queries' and values' biases beside the maps.
        for block in 0..depth {
            for part in ["q", "v"] {
                let at = format!("blocks.{block}.attn");
                if let Some(bias) = tensors.remove(&format!("{at}.{part}_bias")) {
                    tensors.insert(format!("{at}.{part}_proj.bias"), bias);
                }
            }
        }
        // Checkpoints have no rotary embedding, and headless ones no head, which is not used here.
        tensors.insert("rot_pos_embed".into(), rotary_embedding(device)?);
        let head = [
            ("head.weight", vec![CLASSES, width]),
            ("head.bias", vec![CLASSES]),
        ];
        for (name, shape) in head {
            tensors.insert(name.into(), Tensor::zeros(shape, DType::F32, device)?);
        }
        let builder = builder(tensors, device);
        Ok(Self {
            norm: layer_norm(width, EPS, builder.pp("norm"))?,
            model: EVA2VisionTransformer::new(builder, depth, width, width / HEAD_WIDTH)?,
            spec,
        })
    }
}

impl Encoder for Eva02 {
    fn spec(&self) -> &BackboneSpec {
        &self.spec
    }

    fn intermediates(&self, images: &Tensor, blocks: &[usize]) -> Result<Vec<Layer>, Error> {
        check(&self.spec, &self.available_blocks(), images, blocks)?;
        if blocks.is_empty() {
            return Ok(Vec::new());
        }
        // `[B, blocks, N, D]`.
        let patches = each_image(images, |image| {
            let found = self
                .model
                .get_intermediate_layers(image, blocks, false, false, false)?;
            Ok(found.transpose(0, 1)?)
        })?;
        let layer = |i: usize| -> Result<Layer, Error> {
            let patches = patches.narrow(1, i, 1)?.squeeze(1)?.contiguous()?;
            Ok(Layer {
                cls: self.norm.forward(&patches.mean(1)?)?,
                patches: self.norm.forward(&patches)?,
            })
        };
        (0..blocks.len()).map(layer).collect()
    }
}

/// Sines, then cosines, of timm's `RotaryEmbeddingCat` for this grid and a reference grid of 16: `[N, 2 x 64]`.
fn rotary_embedding(device: &Device) -> Result<Tensor, Error> {
    const REFERENCE: f64 = 16.0;
    const TEMPERATURE: f64 = 10_000.0;
    let side = IMAGE_SIZE / PATCH_SIZE;
    let bands: Vec<f64> = (0..HEAD_WIDTH / 4)
        .map(|i| TEMPERATURE.powf(-(i as f64) / (HEAD_WIDTH / 4) as f64))
        .collect();
    let mut values = Vec::with_capacity(side * side * 2 * HEAD_WIDTH);
    for row in 0..side {
        for column in 0..side {
            let angles = [row, column].into_iter().flat_map(|place| {
                let place = place as f64 / side as f64 * REFERENCE;
                bands.iter().map(move |band| place * band)
            });
            let angles: Vec<f64> = angles.flat_map(|angle| [angle, angle]).collect();
            values.extend(angles.iter().map(|angle| angle.sin() as f32));
            values.extend(angles.iter().map(|angle| angle.cos() as f32));
        }
    }
    Ok(Tensor::from_vec(
        values,
        (side * side, 2 * HEAD_WIDTH),
        device,
    )?)
}
