//! What a backbone is: its architecture and the preprocessing its checkpoint was trained with.

use defend_nn::ops::ComputePrecision;
use serde::{Deserialize, Serialize};

use crate::{Error, Grid};

/// Extents of a plain Vision Transformer (Dosovitskiy et al., 2021).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Architecture {
    /// Side of the square training images, pixels.
    pub image_size: usize,
    /// Side of a patch P, pixels.
    pub patch_size: usize,
    /// Channels of a token, D_v.
    pub width: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Attention heads in a block; divides the width.
    pub heads: usize,
    /// Hidden channels of a block's MLP.
    pub mlp_width: usize,
    /// Added to the variance in every LayerNorm: 1e-6 in timm, 1e-12 in Hugging Face ViT.
    pub layer_norm_eps: f64,
    /// Classes of the classification head, 0 without one.
    pub classes: usize,
    /// Whether a distillation token with a position and a head of its own follows the CLS token (DeiT).
    #[serde(default)]
    pub distilled: bool,
    /// Register tokens between CLS token and patches, which have no position (DINOv2).
    #[serde(default)]
    pub registers: usize,
    /// Whether every residual branch is scaled by channel (LayerScale: DINOv2).
    #[serde(default)]
    pub layer_scale: bool,
}

impl Architecture {
    /// ViT-Ti/16 at 224 pixels, without a head: width 192, depth 12, 3 heads.
    pub fn vit_tiny() -> Self {
        Self::vit(192, 12, 3)
    }

    /// ViT-S/16 at 224 pixels, without a head: width 384, depth 12, 6 heads.
    pub fn vit_small() -> Self {
        Self::vit(384, 12, 6)
    }

    /// ViT-B/16 at 224 pixels, without a head: width 768, depth 12, 12 heads.
    pub fn vit_base() -> Self {
        Self::vit(768, 12, 12)
    }

    /// ViT-L/16 at 224 pixels, without a head: width 1024, depth 24, 16 heads.
    pub fn vit_large() -> Self {
        Self::vit(1024, 24, 16)
    }

    fn vit(width: usize, depth: usize, heads: usize) -> Self {
        Self {
            image_size: 224,
            patch_size: 16,
            width,
            depth,
            heads,
            mlp_width: 4 * width,
            layer_norm_eps: 1e-6,
            classes: 0,
            distilled: false,
            registers: 0,
            layer_scale: false,
        }
    }

    /// Rows of the positional embedding before the patches': the CLS token's, and a distillation token's.
    pub(crate) fn first_patch_position(&self) -> usize {
        1 + usize::from(self.distilled)
    }

    /// Tokens before the patches: the CLS token, a distillation token, registers.
    pub fn num_prefix_tokens(&self) -> usize {
        1 + usize::from(self.distilled) + self.registers
    }

    /// Patches of a full view.
    pub fn grid(&self) -> Grid {
        let side = self.image_size / self.patch_size.max(1);
        Grid {
            rows: side,
            columns: side,
        }
    }

    /// Values in a flattened patch: `3 P^2`.
    pub fn patch_values(&self) -> usize {
        3 * self.patch_size * self.patch_size
    }

    /// Checks that the extents make a transformer.
    ///
    /// # Errors
    /// [`Error::Config`] that names the field.
    pub fn validate(&self) -> Result<(), Error> {
        let wrong = |reason: String| {
            Err(Error::Config {
                origin: "backbone architecture".into(),
                reason,
            })
        };
        let extents = [
            ("image_size", self.image_size),
            ("patch_size", self.patch_size),
            ("width", self.width),
            ("depth", self.depth),
            ("heads", self.heads),
            ("mlp_width", self.mlp_width),
        ];
        if let Some((name, _)) = extents.iter().find(|(_, extent)| *extent == 0) {
            return wrong(format!("{name} is 0, expected a positive number"));
        }
        if !self.width.is_multiple_of(self.heads) {
            return wrong(format!(
                "width {} is not a multiple of {} heads",
                self.width, self.heads
            ));
        }
        if !self.image_size.is_multiple_of(self.patch_size) {
            return wrong(format!(
                "image_size {} is not a multiple of patch_size {}",
                self.image_size, self.patch_size
            ));
        }
        if !(self.layer_norm_eps.is_finite() && self.layer_norm_eps > 0.0) {
            return wrong(format!(
                "layer_norm_eps is {}, expected a positive number",
                self.layer_norm_eps
            ));
        }
        Ok(())
    }
}

/// Mean and standard deviation of each colour channel that inputs are normalised with, in `0..=1`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Normalization {
    /// Subtracted.
    pub mean: [f32; 3],
    /// Divided by.
    pub std: [f32; 3],
}

impl Normalization {
    /// ImageNet statistics: DINO, DeiT.
    pub const IMAGENET: Self = Self {
        mean: [0.485, 0.456, 0.406],
        std: [0.229, 0.224, 0.225],
    };
    /// 0.5 throughout: augreg and ImageNet-21k checkpoints.
    pub const HALF: Self = Self {
        mean: [0.5; 3],
        std: [0.5; 3],
    };
}

/// Resampling filter of the checkpoint's preprocessing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Interpolation {
    /// Triangle filter.
    Bilinear,
    /// Catmull-Rom filter.
    Bicubic,
}

/// Everything about a backbone but its weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackboneSpec {
    /// Name for reports, such as `vit_tiny_patch16_224.augreg_in21k_ft_in1k`.
    pub name: String,
    /// Extents.
    pub architecture: Architecture,
    /// Input normalisation of the checkpoint.
    pub normalization: Normalization,
    /// Resampling filter of the checkpoint's preprocessing.
    pub interpolation: Interpolation,
    /// Share of the shorter side that the checkpoint's centre crop keeps, `0..=1`.
    pub crop_pct: f32,
    /// Layers that [`crate::Features`] hold, counted from the last; `1..=depth` (paper, Table 1a: 1, 3, 5).
    #[serde(default = "last_layer_only")]
    pub layers: usize,
    /// How the backbone computes while it is frozen.
    #[serde(default)]
    #[serde(alias = "arithmetic")]
    pub compute_precision: ComputePrecision,
}

fn last_layer_only() -> usize {
    1
}

impl BackboneSpec {
    /// An architecture with the normalisation of ImageNet-21k checkpoints, for models trained from
    /// random weights.
    pub fn new(architecture: Architecture) -> Self {
        Self {
            name: format!(
                "vit_w{}_d{}_patch{}_{}",
                architecture.width,
                architecture.depth,
                architecture.patch_size,
                architecture.image_size
            ),
            architecture,
            normalization: Normalization::HALF,
            interpolation: Interpolation::Bicubic,
            crop_pct: 0.9,
            layers: 1,
            compute_precision: ComputePrecision::F32,
        }
    }

    /// Checks that the extents make a transformer and that it has the layers asked for.
    ///
    /// # Errors
    /// [`Error::Config`] that names the field.
    pub fn validate(&self) -> Result<(), Error> {
        self.architecture.validate()?;
        let depth = self.architecture.depth;
        if (1..=depth).contains(&self.layers) {
            return Ok(());
        }
        Err(Error::Config {
            origin: self.name.clone(),
            reason: format!(
                "cannot return {} layers of {depth} blocks, expected at least 1 and no more than there are",
                self.layers
            ),
        })
    }
}
