//! SigLIP's vision tower (Zhai et al., 2023).

use candle_core::{Device, Tensor};
use candle_nn::{LayerNorm, Linear, Module, VarBuilder, layer_norm, linear};
use candle_transformers::models::siglip::{VisionConfig, VisionModel};
use defend_vit::{Architecture, BackboneSpec, Encoder, Error, Layer, Normalization};

use crate::check::check;
use crate::files::{ModelFiles, builder, named};

/// SigLIP's vision tower: patch tokens of the last block after the last LayerNorm, and its attention pooling of them.
///
/// Models whose image size is no multiple of the patch size, such as `siglip-so400m-patch14-384`, are refused.
pub struct SiglipVision {
    spec: BackboneSpec,
    model: VisionModel,
    pooling: Pooling,
}

impl SiglipVision {
    /// Reads a model as Hugging Face keeps it, with the text tower or without.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Config`], [`Error::Damaged`], and [`Error::Candle`] for a tensor that is missing or does not fit.
    pub fn load(files: &ModelFiles, device: &Device) -> Result<Self, Error> {
        let config: VisionConfig =
            serde_json::from_value(files.vision_config()?).map_err(|e| Error::Config {
                origin: files.name().to_owned(),
                reason: format!("config.json: {e}"),
            })?;
        let vision = builder(files.tensors(device)?, device).pp("vision_model");
        let architecture = Architecture {
            image_size: config.image_size,
            patch_size: config.patch_size,
            width: config.hidden_size,
            depth: config.num_hidden_layers,
            heads: config.num_attention_heads,
            mlp_width: config.intermediate_size,
            layer_norm_eps: config.layer_norm_eps,
            ..Architecture::vit_base()
        };
        let spec = BackboneSpec::new(architecture);
        let spec = named(spec, files.name(), Normalization::HALF);
        spec.validate()?;
        Ok(Self {
            spec,
            // candle's own pooling gives nothing but the pooled vector, and the patches would need a second pass.
            pooling: Pooling::new(&config, &vision.pp("head"))?,
            model: VisionModel::new(&config, false, vision)?,
        })
    }
}

impl Encoder for SiglipVision {
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
        let patches = self.model.forward(images)?;
        let cls = self.pooling.forward(&patches)?;
        Ok(vec![Layer { cls, patches }])
    }
}

/// Attention of one learnt query to the patches, then an MLP around a residual connection.
struct Pooling {
    /// The query before its map, `[1, 1, D]`.
    probe: Tensor,
    queries: Linear,
    /// Keys and values.
    context: [Linear; 2],
    output: Linear,
    norm: LayerNorm,
    mlp: [Linear; 2],
    activation: candle_nn::Activation,
    heads: usize,
}

impl Pooling {
    fn new(config: &VisionConfig, head: &VarBuilder<'_>) -> Result<Self, Error> {
        let (d, hidden) = (config.hidden_size, config.intermediate_size);
        let attention = head.pp("attention");
        let weights = attention.get((3 * d, d), "in_proj_weight")?;
        let biases = attention.get(3 * d, "in_proj_bias")?;
        let part = |i: usize| -> Result<Linear, Error> {
            let (weight, bias) = (weights.narrow(0, i * d, d)?, biases.narrow(0, i * d, d)?);
            Ok(Linear::new(weight, Some(bias)))
        };
        let mlp = head.pp("mlp");
        Ok(Self {
            probe: head.get((1, 1, d), "probe")?,
            queries: part(0)?,
            context: [part(1)?, part(2)?],
            output: linear(d, d, attention.pp("out_proj"))?,
            norm: layer_norm(d, config.layer_norm_eps, head.pp("layernorm"))?,
            mlp: [
                linear(d, hidden, mlp.pp("fc1"))?,
                linear(hidden, d, mlp.pp("fc2"))?,
            ],
            activation: config.hidden_act,
            heads: config.num_attention_heads,
        })
    }

    /// `[B, N, D]` to `[B, D]`.
    fn forward(&self, patches: &Tensor) -> Result<Tensor, Error> {
        let (b, n, d) = patches.dims3()?;
        let by_head = |x: Tensor, tokens: usize| -> Result<Tensor, Error> {
            let x = x.reshape((b, tokens, self.heads, d / self.heads))?;
            Ok(x.transpose(1, 2)?.contiguous()?)
        };
        let [keys, values] = &self.context;
        let q = by_head(self.queries.forward(&self.probe.repeat((b, 1, 1))?)?, 1)?;
        let k = by_head(keys.forward(patches)?, n)?;
        let v = by_head(values.forward(patches)?, n)?;
        let scores = (q.matmul(&k.t()?)? / ((d / self.heads) as f64).sqrt())?;
        let attention = candle_nn::ops::softmax_last_dim(&scores)?;
        let merged = attention.matmul(&v)?.transpose(1, 2)?.reshape((b, 1, d))?;
        let pooled = self.output.forward(&merged)?;
        let [fc1, fc2] = &self.mlp;
        let hidden = fc1.forward(&self.norm.forward(&pooled)?)?;
        let out = (&pooled + fc2.forward(&self.activation.forward(&hidden)?)?)?;
        Ok(out.squeeze(1)?)
    }
}
