//! Where pretrained weights come from, and the preprocessing that comes with them.

use std::path::{Path, PathBuf};

use candle_core::Device;
use serde::Deserialize;

use crate::{
    Architecture, BackboneSpec, Error, Interpolation, Normalization, TrainScope, Vit, Weights,
};

/// Metadata key under which our own files hold the [`BackboneSpec`] as JSON.
const SPEC_KEY: &str = "defend.backbone";

/// A source of pretrained weights.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Pretrained {
    /// A folder with `config.json` and `model.safetensors`, as timm's hub repositories hold them.
    Folder(PathBuf),
    /// A safetensors file: one of ours ([`Vit::to_safetensors`]), or one with a `config.json` beside it.
    File(PathBuf),
    /// Content of one of our files, such as weights compiled into a program.
    Bytes {
        /// Name for errors and reports.
        name: String,
        /// The file's content.
        content: &'static [u8],
    },
    /// A model id of the Hugging Face hub, such as
    /// `timm/vit_small_patch16_224.augreg_in21k_ft_in1k`; downloaded once, then read from the hub's cache.
    #[cfg(feature = "hub")]
    Hub {
        /// `owner/name`.
        model: String,
        /// Branch, tag or commit.
        revision: String,
    },
}

impl Pretrained {
    /// The newest revision of a model on the hub.
    #[cfg(feature = "hub")]
    pub fn hub(model: impl Into<String>) -> Self {
        Self::Hub {
            model: model.into(),
            revision: "main".into(),
        }
    }

    /// A folder or a file on disk.
    pub fn local(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        if path.is_dir() {
            Self::Folder(path)
        } else {
            Self::File(path)
        }
    }

    /// Reads specification and weights.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Config`], [`Error::Damaged`], [`Error::Hub`].
    pub fn read(&self) -> Result<(BackboneSpec, Weights), Error> {
        match self {
            Self::Folder(folder) => with_config(
                &folder.join("config.json"),
                &folder.join("model.safetensors"),
            ),
            Self::File(path) => {
                let weights = Weights::read(path)?;
                if weights.metadata(SPEC_KEY).is_some() {
                    return own(weights);
                }
                let config = path.with_file_name("config.json");
                if !config.is_file() {
                    return Err(Error::Config {
                        origin: path.display().to_string(),
                        reason: format!(
                            "its normalisation and LayerNorm eps are unknown: put the model's config.json beside it ({})",
                            config.display()
                        ),
                    });
                }
                with_config(&config, path)
            }
            Self::Bytes { name, content } => own(Weights::from_bytes(content, name)?),
            #[cfg(feature = "hub")]
            Self::Hub { model, revision } => {
                let files =
                    crate::hub::fetch(model, revision, ["config.json", "model.safetensors"])?;
                let [config, weights] = files;
                with_config(&config, &weights)
            }
        }
    }

    /// Reads a backbone, without its classification head.
    ///
    /// # Errors
    /// As [`Pretrained::read`] and [`Vit::load`].
    pub fn load(&self, scope: TrainScope, device: &Device) -> Result<Vit, Error> {
        let (mut spec, weights) = self.read()?;
        spec.architecture.classes = 0;
        Vit::load(spec, weights, scope, device)
    }

    /// Reads a backbone with its classification head.
    ///
    /// # Errors
    /// As [`Pretrained::load`]; a checkpoint without a head is a [`Error::MissingTensor`].
    pub fn load_classifier(&self, device: &Device) -> Result<Vit, Error> {
        let (spec, weights) = self.read()?;
        Vit::load(spec, weights, TrainScope::Frozen, device)
    }
}

/// One of our own files: the specification is in the metadata.
fn own(weights: Weights) -> Result<(BackboneSpec, Weights), Error> {
    let config = |reason| Error::Config {
        origin: weights.origin().to_owned(),
        reason,
    };
    let json = weights
        .metadata(SPEC_KEY)
        .ok_or_else(|| config(format!("no \"{SPEC_KEY}\" in the file's metadata")))?;
    let spec = serde_json::from_str(json).map_err(|e| config(format!("{SPEC_KEY}: {e}")))?;
    Ok((spec, weights))
}

fn with_config(config: &Path, weights: &Path) -> Result<(BackboneSpec, Weights), Error> {
    let text = std::fs::read_to_string(config).map_err(|source| Error::Io {
        path: config.to_owned(),
        source,
    })?;
    let weights = Weights::read(weights)?;
    let spec = timm_spec(&text, &weights).map_err(|reason| Error::Config {
        origin: config.display().to_string(),
        reason,
    })?;
    Ok((spec, weights))
}

/// The parts of timm's `config.json` that matter here; it has many more.
#[derive(Deserialize)]
struct TimmConfig {
    architecture: String,
    #[serde(default)]
    num_classes: usize,
    pretrained_cfg: TimmPretrained,
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

/// Extents from timm's configuration and the tensors' shapes.
fn timm_spec(json: &str, weights: &Weights) -> Result<BackboneSpec, String> {
    let config: TimmConfig =
        serde_json::from_str(json).map_err(|e| format!("not a timm model configuration: {e}"))?;
    if !config.architecture.starts_with("vit_") && !config.architecture.starts_with("deit_") {
        return Err(format!(
            "architecture \"{}\" is not supported, expected a plain vit_* or deit_* model",
            config.architecture
        ));
    }
    let shape = |name: &str| {
        weights
            .shape(name)
            .ok_or_else(|| format!("{} has no tensor \"{name}\"", weights.origin()))
    };
    let &[width, 3, patch_size, _] = shape("patch_embed.proj.weight")? else {
        return Err("\"patch_embed.proj.weight\" is not [width, 3, patch, patch]".into());
    };
    let &[mlp_width, _] = shape("blocks.0.mlp.fc1.weight")? else {
        return Err("\"blocks.0.mlp.fc1.weight\" is not a matrix".into());
    };
    let mut depth = 0;
    while weights.contains(&format!("blocks.{depth}.norm1.weight")) {
        depth += 1;
    }
    let [_, image_size, image_width] = config.pretrained_cfg.input_size;
    if image_size != image_width {
        return Err(format!(
            "input size {image_size} x {image_width}, expected a square"
        ));
    }
    let pretrained = config.pretrained_cfg;
    let name = match pretrained.tag {
        Some(tag) => format!("{}.{tag}", config.architecture),
        None => config.architecture,
    };
    Ok(BackboneSpec {
        name,
        architecture: Architecture {
            image_size,
            patch_size,
            width,
            depth,
            // Every plain ViT of timm has heads of 64 channels.
            heads: (width / 64).max(1),
            mlp_width,
            layer_norm_eps: 1e-6,
            classes: config.num_classes,
        },
        normalization: Normalization {
            mean: pretrained.mean,
            std: pretrained.std,
        },
        interpolation: pretrained.interpolation.unwrap_or(Interpolation::Bicubic),
        crop_pct: pretrained.crop_pct.unwrap_or(0.9),
    })
}

impl Vit {
    /// A safetensors file of this backbone with its specification in the metadata, stored in
    /// `precision` (`F32` exact, `F16` with a relative error up to 5e-4).
    ///
    /// # Errors
    /// [`Error::Candle`] when candle fails, [`Error::Config`] when serialisation does.
    pub fn to_safetensors(&self, precision: candle_core::DType) -> Result<Vec<u8>, Error> {
        use crate::Backbone;
        let config = |e: &dyn std::fmt::Display| Error::Config {
            origin: self.spec().name.clone(),
            reason: e.to_string(),
        };
        let spec = serde_json::to_string(self.spec()).map_err(|e| config(&e))?;
        let metadata = std::collections::HashMap::from([(SPEC_KEY.to_owned(), spec)]);
        let tensors = self
            .state()?
            .into_iter()
            .map(|(name, tensor)| Ok((name, tensor.to_dtype(precision)?.to_device(&Device::Cpu)?)))
            .collect::<Result<std::collections::BTreeMap<_, _>, Error>>()?;
        safetensors::serialize(&tensors, Some(metadata)).map_err(|e| config(&e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Backbone;
    use candle_core::{DType, Tensor};
    use defend_nn::Rng;

    fn small() -> Vit {
        let architecture = Architecture {
            image_size: 32,
            width: 64,
            depth: 2,
            heads: 1,
            mlp_width: 96,
            ..Architecture::vit_tiny()
        };
        Vit::random(
            BackboneSpec::new(architecture),
            0.0,
            &mut Rng::seed(3),
            &Device::Cpu,
        )
        .unwrap()
    }

    fn config() -> &'static str {
        r#"{"architecture": "vit_test", "num_classes": 0, "pretrained_cfg":
            {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear"}}"#
    }

    #[test]
    fn our_own_file_gives_the_same_features() -> Result<(), Error> {
        let (folder, vit) = (tempfile::tempdir().unwrap(), small());
        let path = folder.path().join("tiny.safetensors");
        std::fs::write(&path, vit.to_safetensors(DType::F32)?).unwrap();
        let again = Pretrained::local(&path).load(TrainScope::Frozen, &Device::Cpu)?;
        assert_eq!(again.spec(), vit.spec());
        let images = Tensor::ones((1, 3, 32, 32), DType::F32, &Device::Cpu)?;
        let difference = (vit.features(&images)?.patches - again.features(&images)?.patches)?;
        assert_eq!(
            difference
                .abs()?
                .flatten_all()?
                .max(0)?
                .to_scalar::<f32>()?,
            0.0
        );
        Ok(())
    }

    #[test]
    fn a_timm_folder_brings_its_normalisation() -> Result<(), Error> {
        let (folder, vit) = (tempfile::tempdir().unwrap(), small());
        std::fs::write(folder.path().join("config.json"), config()).unwrap();
        let file = folder.path().join("model.safetensors");
        candle_core::safetensors::save(&vit.state()?, &file)?;
        for source in [Pretrained::local(folder.path()), Pretrained::local(&file)] {
            let loaded = source.load(TrainScope::LastBlocks(1), &Device::Cpu)?;
            assert_eq!(loaded.spec().normalization.mean, [0.1, 0.2, 0.3]);
            assert_eq!(loaded.spec().interpolation, Interpolation::Bilinear);
        }
        let error = Pretrained::local(folder.path()).load(TrainScope::LastBlocks(3), &Device::Cpu);
        assert!(matches!(error, Err(Error::Config { .. })));
        Ok(())
    }

    #[test]
    fn faults_name_the_file_and_the_tensor() {
        let (folder, vit) = (tempfile::tempdir().unwrap(), small());
        let file = folder.path().join("model.safetensors");
        let load = |change: &dyn Fn(&mut std::collections::HashMap<String, Tensor>)| {
            let mut tensors = vit.state().unwrap();
            change(&mut tensors);
            candle_core::safetensors::save(&tensors, &file).unwrap();
            let error = Pretrained::local(&file)
                .load(TrainScope::Frozen, &Device::Cpu)
                .unwrap_err();
            error.to_string()
        };
        let without_config = load(&|_| ());
        assert!(without_config.contains("config.json"), "{without_config}");
        std::fs::write(folder.path().join("config.json"), config()).unwrap();
        let zeros = |n: usize| Tensor::zeros(n, DType::F32, &Device::Cpu).unwrap();
        let missing = load(&|t| drop(t.remove("blocks.1.attn.qkv.bias")));
        assert!(
            missing.contains("blocks.1.attn.qkv.bias") && missing.contains("[192]"),
            "{missing}"
        );
        let shape = load(&|t| drop(t.insert("norm.bias".into(), zeros(7))));
        assert!(
            shape.contains("norm.bias") && shape.contains("[7]") && shape.contains("[64]"),
            "{shape}"
        );
        let extra = load(&|t| drop(t.insert("decoder.weight".into(), zeros(7))));
        assert!(extra.contains("decoder.weight"), "{extra}");
        let nan = load(&|t| drop(t.insert("norm.bias".into(), (zeros(64) / 0.0).unwrap())));
        assert!(nan.contains("norm.bias") && nan.contains("NaN"), "{nan}");
        let whole = std::fs::read(&file).unwrap();
        std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
        let truncated = Pretrained::local(&file)
            .load(TrainScope::Frozen, &Device::Cpu)
            .unwrap_err();
        assert!(matches!(truncated, Error::Damaged { .. }), "{truncated}");
    }
}
