//! Configuration and weights of a model.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use defend_vit::{BackboneSpec, Error, Interpolation, Normalization};
use serde_json::Value;

/// Where a model's `config.json` and `model.safetensors` are.
#[derive(Debug, Clone)]
pub struct ModelFiles {
    name: String,
    /// None for weights of a known architecture.
    config: Option<PathBuf>,
    weights: PathBuf,
}

impl ModelFiles {
    /// A folder as the hub's repositories are.
    pub fn folder(folder: impl AsRef<Path>) -> Self {
        let folder = folder.as_ref();
        Self {
            name: folder.display().to_string(),
            config: Some(folder.join("config.json")),
            weights: folder.join("model.safetensors"),
        }
    }

    /// A safetensors file alone, for models whose architecture the caller names.
    pub fn weights(file: impl AsRef<Path>) -> Self {
        let file = file.as_ref();
        Self {
            name: file.display().to_string(),
            config: None,
            weights: file.to_owned(),
        }
    }

    /// A model on the Hugging Face hub, such as `openai/clip-vit-base-patch32`; downloaded once, then read from the hub's cache.
    ///
    /// # Errors
    /// [`Error::Hub`].
    #[cfg(feature = "hub")]
    pub fn hub(model: &str) -> Result<Self, Error> {
        let fetch = |file| defend_vit::hub_file(model, "main", file);
        Ok(Self {
            name: model.to_owned(),
            config: Some(fetch("config.json")?),
            weights: fetch("model.safetensors")?,
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The vision part of a configuration: `vision_config` of a model of images and text, or the whole.
    pub(crate) fn vision_config(&self) -> Result<Value, Error> {
        let wrong = |reason: String| Error::Config {
            origin: self.name.clone(),
            reason,
        };
        let Some(path) = &self.config else {
            return Err(wrong("no config.json, expected a folder with one".into()));
        };
        let text = std::fs::read_to_string(path).map_err(|source| Error::Io {
            path: path.clone(),
            source,
        })?;
        let config: Value =
            serde_json::from_str(&text).map_err(|e| wrong(format!("config.json: {e}")))?;
        Ok(config.get("vision_config").cloned().unwrap_or(config))
    }

    /// All tensors as `f32`.
    pub(crate) fn tensors(&self, device: &Device) -> Result<HashMap<String, Tensor>, Error> {
        if !self.weights.is_file() {
            return Err(Error::Io {
                path: self.weights.clone(),
                source: std::io::ErrorKind::NotFound.into(),
            });
        }
        let damaged = |e: candle_core::Error| Error::Damaged {
            origin: self.name.clone(),
            reason: e.to_string(),
        };
        let tensors = candle_core::safetensors::load(&self.weights, device).map_err(damaged)?;
        let single = |(name, tensor): (String, Tensor)| match tensor.dtype() {
            DType::F16 | DType::BF16 | DType::F64 => Ok((name, tensor.to_dtype(DType::F32)?)),
            _ => Ok((name, tensor)),
        };
        tensors.into_iter().map(single).collect()
    }
}

/// Tensors for candle's constructors.
pub(crate) fn builder(tensors: HashMap<String, Tensor>, device: &Device) -> VarBuilder<'static> {
    VarBuilder::from_tensors(tensors, DType::F32, device)
}

/// An extent that a configuration must have.
pub(crate) fn extent(
    config: &Value,
    origin: &str,
    name: &str,
    usual: usize,
) -> Result<usize, Error> {
    match config.get(name) {
        None => Ok(usual),
        Some(value) => match value.as_u64().and_then(|v| usize::try_from(v).ok()) {
            Some(found) if found > 0 => Ok(found),
            _ => Err(Error::Config {
                origin: origin.to_owned(),
                reason: format!("{name} is {value}, expected a positive whole number"),
            }),
        },
    }
}

/// The specification of a model with a normalisation.
pub(crate) fn named(
    mut spec: BackboneSpec,
    name: &str,
    normalization: Normalization,
) -> BackboneSpec {
    name.clone_into(&mut spec.name);
    spec.normalization = normalization;
    spec.interpolation = Interpolation::Bicubic;
    spec
}

/// Mean and deviation of CLIP's images, which EVA-02 took over.
pub(crate) const CLIP: Normalization = Normalization {
    mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
    std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
};
