//! What a checkpoint's configuration files, or its family, say of architecture and preprocessing.

use serde::{Deserialize, Serialize};

use crate::{Architecture, BackboneSpec, Interpolation, Normalization, Weights};

/// Where Hugging Face's models keep their normalisation.
pub(crate) const PREPROCESSOR: &str = "preprocessor_config.json";

/// Origin of a weight file that comes without a configuration.
///
/// All have a LayerNorm eps of 1e-6 and heads of 64 channels, but the largest; the image size follows from the
/// positional embedding.
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
        extents.expect_depth(name, published_depth(name))?;
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

const GATED: &str = "its MLP is gated (SwiGLU, as in the giant DINOv2), which is not supported";

/// Blocks of a model with a published name, such as `vit_huge_patch14_224`, `dino_deitsmall16_pretrain` or `dinov2_vitl14`;
/// `None` for any other.
fn published_depth(name: &str) -> Option<usize> {
    let name = name.to_ascii_lowercase();
    let sizes = [
        ("tiny", "ti16", 12),
        ("small", "s14", 12),
        ("base", "b14", 12),
        ("large", "l14", 24),
        ("huge", "h14", 32),
        ("so400m", "so400m", 27),
        ("giant", "g14", 40),
        ("gigantic", "gigantic", 48),
    ];
    if !["vit_", "deit", "dino"]
        .iter()
        .any(|start| name.starts_with(start))
    {
        return None;
    }
    // `vit_small_patch16_36x1` and `18x2` say their depth themselves.
    if name.contains("36x1") || name.contains("18x2") {
        return None;
    }
    let mut sizes_named = ["vit", "deit3", "deit"].iter().flat_map(|family| {
        name.match_indices(family)
            .map(|(at, _)| name[at + family.len()..].trim_start_matches('_'))
    });
    sizes_named.find_map(|rest| {
        let size = sizes
            .iter()
            .find(|(long, short, _)| rest.starts_with(long) || rest.starts_with(short))?;
        Some(size.2)
    })
}

/// Heads of a plain ViT of this width: all have heads of 64 channels but so400m, huge, giant and gigantic.
fn published_heads(width: usize) -> Result<usize, String> {
    match width {
        1152 | 1280 | 1408 | 1664 => Ok(16),
        0..64 => Ok(1),
        _ if width.is_multiple_of(64) => Ok(width / 64),
        _ => Err(format!(
            "the number of heads is not known for width {width}: say it in config.json (\"model_args\": {{\"num_heads\": ...}})"
        )),
    }
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
        if weights.contains("blocks.0.mlp.weights_in.weight")
            || weights.contains("blocks.0.mlp.w12.weight")
        {
            return Err(GATED.into());
        }
        let &[mlp_width, _] = shape(weights, "blocks.0.mlp.fc1.weight")? else {
            return Err("\"blocks.0.mlp.fc1.weight\" is not a matrix".into());
        };
        if shape(weights, "blocks.0.mlp.fc2.weight")?.last() == Some(&(mlp_width / 2)) {
            return Err(GATED.into());
        }
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

    /// Refuses weights of fewer blocks than there should be: of a file cut short, or of another model.
    fn expect_depth(&self, name: &str, expected: Option<usize>) -> Result<(), String> {
        match expected {
            Some(expected) if self.depth < expected => Err(format!(
                "the weights have {} blocks, and \"{name}\" has {expected}: the file is cut short, or another model's",
                self.depth
            )),
            _ => Ok(()),
        }
    }

    /// `heads`: `None` for those of a published model of this width.
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
            heads: match heads {
                Some(heads) => heads,
                None => published_heads(self.width)?,
            },
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
    depth: Option<usize>,
    #[serde(default)]
    img_size: Option<usize>,
}

impl TimmConfig {
    fn spec(self, weights: &Weights) -> Result<BackboneSpec, String> {
        let plain = ["vit_", "deit_", "deit3_"];
        if !plain.iter().any(|name| self.architecture.starts_with(name)) {
            return Err(format!(
                "architecture \"{}\" is not supported, expected a plain vit_*, deit_* or deit3_* model",
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
        let depth = self.model_args.depth;
        let depth = depth.or_else(|| published_depth(&self.architecture));
        extents.expect_depth(&self.architecture, depth)?;
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
    #[serde(default)]
    num_hidden_layers: Option<usize>,
    image_size: usize,
    layer_norm_eps: f64,
    #[serde(default)]
    hidden_act: Option<String>,
}

#[derive(Deserialize)]
struct Preprocessor {
    #[serde(default)]
    do_rescale: Option<bool>,
    /// What values in `0..=255` are multiplied by before they are normalised.
    #[serde(default)]
    rescale_factor: Option<f32>,
    #[serde(default)]
    do_normalize: Option<bool>,
    #[serde(default)]
    image_mean: Option<[f32; 3]>,
    #[serde(default)]
    image_std: Option<[f32; 3]>,
    /// Pillow's number of the filter.
    #[serde(default)]
    resample: Option<u32>,
}

impl Preprocessor {
    /// The normalisation of values in `0..=1` that gives what rescaling and normalising values in `0..=255` does.
    fn normalization(&self) -> Result<Normalization, String> {
        let factor = match self.do_rescale {
            Some(false) => 1.0,
            _ => self.rescale_factor.unwrap_or(1.0 / 255.0),
        };
        if !(factor.is_finite() && factor > 0.0) {
            return Err(format!(
                "rescale_factor is {factor}, expected a positive number"
            ));
        }
        let (mean, std) = match (self.do_normalize, self.image_mean, self.image_std) {
            (Some(false), _, _) => ([0.0; 3], [1.0; 3]),
            (_, Some(mean), Some(std)) => (mean, std),
            _ => return Err("image_mean or image_std is missing".into()),
        };
        // 255 times the usual factor is 1 but for its rounding.
        let range = factor * 255.0;
        let range = if (range - 1.0).abs() < 1e-6 {
            1.0
        } else {
            range
        };
        Ok(Normalization {
            mean: mean.map(|m| m / range),
            std: std.map(|s| s / range),
        })
    }
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
        let normalization = preprocessor
            .normalization()
            .map_err(|reason| format!("{PREPROCESSOR}: {reason}"))?;
        let extents = Extents::new(weights)?;
        extents.expect_depth(&self.model_type, self.num_hidden_layers)?;
        let architecture = extents.architecture(
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
            normalization,
            interpolation,
            ..BackboneSpec::new(architecture)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_names_say_their_depth() {
        for (name, depth) in [
            ("vit_tiny_patch16_224", Some(12)),
            ("vit_small_patch14_reg4_dinov2", Some(12)),
            ("deit3_large_patch16_224", Some(24)),
            ("vit_huge_patch14_224", Some(32)),
            ("vit_giant_patch14_224", Some(40)),
            ("vit_gigantic_patch14_224", Some(48)),
            ("vit_so400m_patch14_x", Some(27)),
            ("dino_deitsmall16_pretrain", Some(12)),
            ("dino_vitbase8_pretrain", Some(12)),
            ("dinov2_vitl14_reg4_pretrain", Some(24)),
            ("vit_small_patch16_36x1_224", None),
            ("vit_medium_patch16_gap_240", None),
            ("my_small_network", None),
            ("my_vit_small_of_six_blocks", None),
            ("checkpoint", None),
        ] {
            assert_eq!(published_depth(name), depth, "{name}");
        }
    }

    #[test]
    fn heads_of_published_widths() {
        let widths = [
            (192, 3),
            (768, 12),
            (1024, 16),
            (1152, 16),
            (1280, 16),
            (1408, 16),
            (1536, 24),
            (1664, 16),
        ];
        for (width, heads) in widths {
            assert_eq!(published_heads(width), Ok(heads), "{width}");
        }
        assert!(published_heads(200).is_err());
    }

    #[test]
    fn a_preprocessor_may_leave_out_its_steps() {
        let normalization = |json: &str| {
            let read: Preprocessor = serde_json::from_str(json).unwrap();
            read.normalization()
        };
        let usual = normalization(
            r#"{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4],
            "do_rescale": true, "rescale_factor": 0.00392156862745098, "do_normalize": true}"#,
        )
        .unwrap();
        assert_eq!(
            usual,
            Normalization {
                mean: [0.5, 0.4, 0.3],
                std: [0.2, 0.3, 0.4]
            }
        );
        // Values of 0..=255 as they are, normalised: 255 (v - m / 255) / s.
        let raw = normalization(
            r#"{"image_mean": [127.5, 0, 255], "image_std": [255, 51, 1], "do_rescale": false}"#,
        )
        .unwrap();
        assert_eq!(
            raw,
            Normalization {
                mean: [0.5, 0.0, 1.0],
                std: [1.0, 0.2, 1.0 / 255.0]
            }
        );
        // Values of -1..=1 by a factor of 1 / 127.5 and mean 1.
        let wide = normalization(r#"{"image_mean": [1, 1, 1], "image_std": [1, 1, 1], "rescale_factor": 0.00784313725490196}"#).unwrap();
        assert_eq!(wide.mean.map(|m| (m * 1e6).round()), [500_000.0; 3]);
        let none = normalization(r#"{"do_normalize": false}"#).unwrap();
        assert_eq!(
            none,
            Normalization {
                mean: [0.0; 3],
                std: [1.0; 3]
            }
        );
        assert!(normalization("{}").is_err());
        assert!(normalization(r#"{"do_normalize": false, "rescale_factor": 0}"#).is_err());
    }
}
