//! What a checkpoint's configuration files, or its family, say of architecture and preprocessing.

use serde::{Deserialize, Serialize};

use crate::{Architecture, BackboneSpec, Interpolation, Normalization, Weights};

/// Where Hugging Face's models keep their normalisation.
pub(crate) const PREPROCESSOR: &str = "preprocessor_config.json";

/// Origin of a weight file that comes without a configuration.
///
/// All have heads of 64 channels and a LayerNorm eps of 1e-6; the image size follows from the positional
/// embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// Google's and timm's "augreg" and ImageNet-21k weights: mean and deviation 0.5.
    Augreg,
    /// DINO (Caron et al., 2021): ImageNet's statistics.
    Dino,
    /// DeiT (Touvron et al., 2021), distilled or not: ImageNet's statistics.
    Deit,
    /// DINOv2 (Oquab et al., 2023), with or without registers: ImageNet's statistics.
    DinoV2,
}

impl Family {
    /// The specification of weights with timm's names.
    pub(crate) fn spec(self, name: &str, weights: &Weights) -> Result<BackboneSpec, String> {
        let extents = Extents::new(weights)?;
        let positions = shape(weights, "pos_embed")?;
        let rows = positions.get(1).copied().unwrap_or(0);
        let patches = rows.saturating_sub(1 + usize::from(extents.distilled));
        let side = patches.isqrt();
        if side * side != patches {
            return Err(format!(
                "\"pos_embed\" has {rows} rows, expected those of a square grid of patches"
            ));
        }
        let image_size = side * extents.patch_size;
        let classes = head_classes(weights);
        let architecture = extents.architecture(image_size, None, 1e-6, classes)?;
        Ok(BackboneSpec {
            name: name.to_owned(),
            normalization: match self {
                Self::Augreg => Normalization::HALF,
                Self::Dino | Self::Deit | Self::DinoV2 => Normalization::IMAGENET,
            },
            ..BackboneSpec::new(architecture)
        })
    }
}

/// Reads `config.json` of timm or Hugging Face; `weights` has timm's names.
pub(crate) fn spec(
    json: &str,
    preprocessor: Option<&str>,
    weights: &Weights,
) -> Result<BackboneSpec, String> {
    let value: serde_json::Value =
        serde_json::from_str(json).map_err(|e| format!("not JSON: {e}"))?;
    if names_model_type(&value) {
        let config: HuggingFaceConfig = serde_json::from_value(value)
            .map_err(|e| format!("not a Hugging Face model configuration: {e}"))?;
        config.spec(preprocessor, weights)
    } else {
        let config: TimmConfig = serde_json::from_value(value)
            .map_err(|e| format!("not a timm model configuration: {e}"))?;
        config.spec(weights)
    }
}

/// Whether a `config.json` is of Hugging Face's own models, which keep their normalisation in [`PREPROCESSOR`].
#[cfg(feature = "hub")]
pub(crate) fn is_hugging_face(json: &str) -> bool {
    serde_json::from_str(json).is_ok_and(|value| names_model_type(&value))
}

fn names_model_type(config: &serde_json::Value) -> bool {
    config.get("model_type").is_some()
}

/// Outputs of the classification head, 0 without one.
fn head_classes(weights: &Weights) -> usize {
    let shape = weights.shape("head.weight").unwrap_or_default();
    shape.first().copied().unwrap_or(0)
}

fn shape<'a>(weights: &'a Weights, name: &str) -> Result<&'a [usize], String> {
    weights
        .shape(name)
        .ok_or_else(|| format!("{} has no tensor \"{name}\"", weights.origin()))
}

/// What the shapes of the tensors tell.
struct Extents {
    width: usize,
    patch_size: usize,
    mlp_width: usize,
    depth: usize,
    distilled: bool,
    registers: usize,
    layer_scale: bool,
}

impl Extents {
    fn new(weights: &Weights) -> Result<Self, String> {
        let &[width, 3, patch_size, _] = shape(weights, "patch_embed.proj.weight")? else {
            return Err("\"patch_embed.proj.weight\" is not [width, 3, patch, patch]".into());
        };
        let &[mlp_width, _] = shape(weights, "blocks.0.mlp.fc1.weight")? else {
            return Err("\"blocks.0.mlp.fc1.weight\" is not a matrix".into());
        };
        let mut depth = 0;
        while weights.contains(&format!("blocks.{depth}.norm1.weight")) {
            depth += 1;
        }
        Ok(Self {
            width,
            patch_size,
            mlp_width,
            depth,
            distilled: weights.contains("dist_token"),
            registers: weights
                .shape("reg_token")
                .and_then(|s| s.get(1).copied())
                .unwrap_or(0),
            layer_scale: weights.contains("blocks.0.ls1.gamma"),
        })
    }

    /// `heads`: `None` for heads of 64 channels.
    fn architecture(
        self,
        image_size: usize,
        heads: Option<usize>,
        layer_norm_eps: f64,
        classes: usize,
    ) -> Result<Architecture, String> {
        let architecture = Architecture {
            image_size,
            patch_size: self.patch_size,
            width: self.width,
            depth: self.depth,
            heads: heads.unwrap_or((self.width / 64).max(1)),
            mlp_width: self.mlp_width,
            layer_norm_eps,
            classes,
            distilled: self.distilled,
            registers: self.registers,
            layer_scale: self.layer_scale,
        };
        architecture.validate().map_err(|e| e.to_string())?;
        Ok(architecture)
    }
}

/// The parts of timm's `config.json` that matter here; it has many more.
#[derive(Deserialize)]
struct TimmConfig {
    architecture: String,
    #[serde(default)]
    num_classes: usize,
    pretrained_cfg: TimmPretrained,
    #[serde(default)]
    model_args: TimmArguments,
}

#[derive(Deserialize)]
struct TimmPretrained {
    #[serde(default)]
    tag: Option<String>,
    input_size: [usize; 3],
    #[serde(default)]
    interpolation: Option<Interpolation>,
    #[serde(default)]
    crop_pct: Option<f32>,
    mean: [f32; 3],
    std: [f32; 3],
}

/// Arguments by which a model differs from its architecture's name.
#[derive(Deserialize, Default)]
struct TimmArguments {
    #[serde(default)]
    num_heads: Option<usize>,
    #[serde(default)]
    img_size: Option<usize>,
}

impl TimmConfig {
    fn spec(self, weights: &Weights) -> Result<BackboneSpec, String> {
        if !self.architecture.starts_with("vit_") && !self.architecture.starts_with("deit_") {
            return Err(format!(
                "architecture \"{}\" is not supported, expected a plain vit_* or deit_* model",
                self.architecture
            ));
        }
        let pretrained = self.pretrained_cfg;
        let [_, height, width] = pretrained.input_size;
        if height != width {
            return Err(format!("input size {height} x {width}, expected a square"));
        }
        let image_size = self.model_args.img_size.unwrap_or(height);
        let heads = self.model_args.num_heads;
        let extents = Extents::new(weights)?;
        let architecture = extents.architecture(image_size, heads, 1e-6, self.num_classes)?;
        let usual = BackboneSpec::new(architecture);
        Ok(BackboneSpec {
            name: match pretrained.tag {
                Some(tag) => format!("{}.{tag}", self.architecture),
                None => self.architecture,
            },
            normalization: Normalization {
                mean: pretrained.mean,
                std: pretrained.std,
            },
            interpolation: pretrained.interpolation.unwrap_or(usual.interpolation),
            crop_pct: pretrained.crop_pct.unwrap_or(usual.crop_pct),
            ..usual
        })
    }
}

/// The parts of a Hugging Face `config.json` that matter here.
#[derive(Deserialize)]
struct HuggingFaceConfig {
    model_type: String,
    #[serde(default, rename = "_name_or_path")]
    name: Option<String>,
    num_attention_heads: usize,
    image_size: usize,
    layer_norm_eps: f64,
    #[serde(default)]
    hidden_act: Option<String>,
}

#[derive(Deserialize)]
struct Preprocessor {
    image_mean: [f32; 3],
    image_std: [f32; 3],
    /// Pillow's number of the filter.
    #[serde(default)]
    resample: Option<u32>,
}

impl HuggingFaceConfig {
    fn spec(self, preprocessor: Option<&str>, weights: &Weights) -> Result<BackboneSpec, String> {
        const TYPES: [&str; 4] = ["vit", "deit", "dinov2", "dinov2_with_registers"];
        if !TYPES.contains(&self.model_type.as_str()) {
            return Err(format!(
                "model_type \"{}\" is not supported, expected one of {}",
                self.model_type,
                TYPES.join(", ")
            ));
        }
        if let Some(act) = self.hidden_act.filter(|act| act != "gelu") {
            return Err(format!("hidden_act is \"{act}\", expected \"gelu\""));
        }
        let preprocessor = preprocessor.ok_or_else(|| {
            format!("its normalisation is unknown: put the model's {PREPROCESSOR} beside it")
        })?;
        let preprocessor: Preprocessor =
            serde_json::from_str(preprocessor).map_err(|e| format!("{PREPROCESSOR}: {e}"))?;
        let interpolation = match preprocessor.resample {
            Some(2) => Interpolation::Bilinear,
            Some(3) | None => Interpolation::Bicubic,
            Some(other) => {
                return Err(format!(
                    "{PREPROCESSOR}: resample is {other}, expected 2 (bilinear) or 3 (bicubic)"
                ));
            }
        };
        let architecture = Extents::new(weights)?.architecture(
            self.image_size,
            Some(self.num_attention_heads),
            self.layer_norm_eps,
            head_classes(weights),
        )?;
        Ok(BackboneSpec {
            name: self
                .name
                .filter(|name| !name.is_empty())
                .unwrap_or(self.model_type),
            normalization: Normalization {
                mean: preprocessor.image_mean,
                std: preprocessor.image_std,
            },
            interpolation,
            ..BackboneSpec::new(architecture)
        })
    }
}
