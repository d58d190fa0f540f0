//! CLIP's vision tower (Radford et al., 2021).

use candle_core::{Device, Tensor};
use candle_nn::{LayerNorm, Module, layer_norm};
use candle_transformers::models::clip::text_model::Activation;
use candle_transformers::models::clip::vision_model::{ClipVisionConfig, ClipVisionTransformer};
use defend_vit::{Architecture, BackboneSpec, Encoder, Error, Layer};

use crate::check::check;
use crate::files::{CLIP, ModelFiles, builder, extent, named};

/// Added to the variance in CLIP's LayerNorms, as candle has it.
const EPS: f64 = 1e-5;

/// CLIP's vision tower: CLS and patch tokens of every block, after the last LayerNorm.
pub struct ClipVision {
    spec: BackboneSpec,
    model: ClipVisionTransformer,
    post_layernorm: LayerNorm,
}

impl ClipVision {
    /// Reads a model as Hugging Face keeps it, with the text tower or without.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Config`], [`Error::Damaged`], and [`Error::Candle`] for a tensor that is missing or does not fit.
    pub fn load(files: &ModelFiles, device: &Device) -> Result<Self, Error> {
        let config = files.vision_config()?;
        let at = |name, usual| extent(&config, files.name(), name, usual);
        if let Some(other) = config.get("hidden_act").and_then(|a| a.as_str())
            && other != "quick_gelu"
        {
            return Err(Error::Config {
                origin: files.name().to_owned(),
                reason: format!(
                    "hidden_act is {other}, expected quick_gelu: candle's type knows no other"
                ),
            });
        }
        let config = ClipVisionConfig {
            embed_dim: at("hidden_size", 768)?,
            activation: Activation::QuickGelu,
            intermediate_size: at("intermediate_size", 3072)?,
            num_hidden_layers: at("num_hidden_layers", 12)?,
            num_attention_heads: at("num_attention_heads", 12)?,
            projection_dim: at("projection_dim", 512)?,
            num_channels: 3,
            image_size: at("image_size", 224)?,
            patch_size: at("patch_size", 32)?,
        };
        let vision = builder(files.tensors(device)?, device).pp("vision_model");
        let architecture = Architecture {
            image_size: config.image_size,
            patch_size: config.patch_size,
            width: config.embed_dim,
            depth: config.num_hidden_layers,
            heads: config.num_attention_heads,
            mlp_width: config.intermediate_size,
            layer_norm_eps: EPS,
            ..Architecture::vit_base()
        };
        let spec = named(BackboneSpec::new(architecture), files.name(), CLIP);
        spec.validate()?;
        Ok(Self {
            spec,
            post_layernorm: layer_norm(config.embed_dim, EPS, vision.pp("post_layernorm"))?,
            model: ClipVisionTransformer::new(vision, &config)?,
        })
    }
}

impl Encoder for ClipVision {
    fn spec(&self) -> &BackboneSpec {
        &self.spec
    }

    fn intermediates(&self, images: &Tensor, blocks: &[usize]) -> Result<Vec<Layer>, Error> {
        check(&self.spec, &self.available_blocks(), images, blocks)?;
        let states = self.model.output_hidden_states(images)?;
        let layer = |block: &usize| -> Result<Layer, Error> {
            let tokens = self.post_layernorm.forward(&states[*block])?;
            let patches = tokens.dim(1)? - 1;
            Ok(Layer {
                cls: tokens.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?,
                patches: tokens.narrow(1, 1, patches)?.contiguous()?,
            })
        };
        blocks.iter().map(layer).collect()
    }
}
