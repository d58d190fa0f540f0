//! Where pretrained weights come from, and the preprocessing that comes with them.

use std::path::{Path, PathBuf};

use candle_core::Device;

use safetensors::tensor::TensorView;

use crate::int8::{Int8Matrix, float_buffer, half_buffer};
use crate::{BackboneSpec, Error, TrainScope, Vit, Weights, layout, model_config};

pub use crate::model_config::Family;

/// Metadata key under which our own files hold the [`BackboneSpec`] as JSON.
const SPEC_KEY: &str = "defend.backbone";

/// A source of pretrained weights.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Pretrained {
    /// A folder with `config.json` and `model.safetensors` or `pytorch_model.bin`, as the hub's repositories
    /// hold them; models of Hugging Face's own also need their `preprocessor_config.json`.
    Folder(PathBuf),
    /// A weight file: one of ours ([`Vit::to_safetensors`]), or one with a `config.json` beside it.
    File(PathBuf),
    /// A weight file that says nothing of its preprocessing, such as DINO's and DeiT's `.pth` files.
    StateDict {
        /// The file: `.pth`, `.pt` or `.bin` of PyTorch, or safetensors.
        path: PathBuf,
        /// What the weights were trained with.
        family: Family,
    },
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

/// How exactly [`Vit::to_safetensors`] stores weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightPrecision {
    /// As they are.
    F32,
    /// Rounded to `f16`: half the space, a relative error of up to 5e-4.
    F16,
    /// Matrices as eight-bit integers with a scale for each output channel, the rest as it is: a quarter of the space, an error of up to
    /// half a 127th of the channel's largest weight. What is read back is stored as the same bytes again.
    Int8,
}

/// Model files in the order of preference: whole, or in parts with an index.
const WEIGHT_FILES: [&str; 4] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
];

impl Pretrained {
    /// The newest revision of a model on the hub.
    #[cfg(feature = "hub")]
    pub fn hub(model: impl Into<String>) -> Self {
        Self::Hub {
            model: model.into(),
            revision: "main".into(),
        }
    }

    /// What a user writes for a backbone: `hub:owner/name` or `hub:owner/name@revision` of the hub, or the path of a folder or
    /// file. A path that does not exist is never taken for a model of the hub.
    ///
    /// # Errors
    /// [`Error::Config`] for a path where nothing is, for an impossible model id, and for any in a build without the feature
    /// `hub`.
    pub fn parse(name: &str) -> Result<Self, Error> {
        let wrong = |reason: &str| Error::Config {
            origin: name.to_owned(),
            reason: reason.to_owned(),
        };
        let Some(model) = name.strip_prefix("hub:") else {
            if !Path::new(name).exists() {
                return Err(wrong(
                    "there is no such file or folder; a model of the hub is written hub:owner/name",
                ));
            }
            return Ok(Self::local(name));
        };
        let (model, revision) = model.split_once('@').unwrap_or((model, "main"));
        let parts: Vec<&str> = model.split('/').collect();
        let named = |part: &&str| !part.is_empty() && !part.starts_with('.');
        if parts.len() != 2 || !parts.iter().all(named) || revision.is_empty() {
            return Err(wrong("expected hub:owner/name or hub:owner/name@revision"));
        }
        #[cfg(feature = "hub")]
        return Ok(Self::Hub {
            model: model.into(),
            revision: revision.into(),
        });
        #[cfg(not(feature = "hub"))]
        Err(wrong(
            "this build reads nothing from the hub (feature `hub`)",
        ))
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

    /// A weight file without a configuration, of a known family.
    pub fn state_dict(path: impl Into<PathBuf>, family: Family) -> Self {
        Self::StateDict {
            path: path.into(),
            family,
        }
    }

    /// Reads specification and weights, the latter with timm's names.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Config`], [`Error::Damaged`], [`Error::UnknownLayout`], [`Error::Hub`].
    pub fn read(&self) -> Result<(BackboneSpec, Weights), Error> {
        match self {
            Self::Folder(folder) => {
                let files = WEIGHT_FILES.map(|name| folder.join(name));
                let Some(weights) = files.iter().find(|file| file.exists()) else {
                    return Err(Error::Config {
                        origin: folder.display().to_string(),
                        reason: format!(
                            "the folder holds no weights, expected one of {}",
                            WEIGHT_FILES.join(", ")
                        ),
                    });
                };
                with_config(&folder.join("config.json"), weights)
            }
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
                            "its normalisation and LayerNorm eps are unknown: put the model's config.json beside it ({}), or name the family that they are of (augreg, dino, deit, dinov2)",
                            config.display()
                        ),
                    });
                }
                with_config(&config, path)
            }
            Self::StateDict { path, family } => {
                let mut weights = Weights::read(path)?;
                layout::to_timm(&mut weights)?;
                let name = path.file_stem().unwrap_or_default().to_string_lossy();
                let spec = family
                    .spec(&name, &weights)
                    .map_err(|reason| Error::Config {
                        origin: path.display().to_string(),
                        reason,
                    })?;
                Ok((spec, weights))
            }
            Self::Bytes { name, content } => own(Weights::from_bytes(content, name)?),
            #[cfg(feature = "hub")]
            Self::Hub { model, revision } => {
                let fetch = |files: &[&str]| crate::hub::fetch(model, revision, files);
                let config = fetch(&["config.json"])?;
                // timm's models have no such file: asking for it would need the network at every start.
                if model_config::is_hugging_face(&read_text(&config)?) {
                    fetch(&[model_config::PREPROCESSOR])?;
                }
                let weights = fetch(&WEIGHT_FILES)?;
                if weights.extension().is_some_and(|e| e == "json") {
                    for file in crate::shards::files(&crate::shards::weight_map(&weights)?) {
                        fetch(&[file])?;
                    }
                }
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

fn read_text(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|source| Error::Io {
        path: path.to_owned(),
        source,
    })
}

fn with_config(config: &Path, weights: &Path) -> Result<(BackboneSpec, Weights), Error> {
    let text = read_text(config)?;
    let mut weights = Weights::read(weights)?;
    layout::to_timm(&mut weights)?;
    let preprocessor = config.with_file_name(model_config::PREPROCESSOR);
    let preprocessor = std::fs::read_to_string(preprocessor).ok();
    let spec = model_config::spec(&text, preprocessor.as_deref(), &weights).map_err(|reason| {
        Error::Config {
            origin: config.display().to_string(),
            reason,
        }
    })?;
    Ok((spec, weights))
}

impl Vit {
    /// A safetensors file of this backbone with its specification in the metadata.
    ///
    /// # Errors
    /// [`Error::Candle`] when candle fails, [`Error::Config`] when serialisation does.
    pub fn to_safetensors(&self, precision: WeightPrecision) -> Result<Vec<u8>, Error> {
        use crate::Encoder;
        let config = |e: &dyn std::fmt::Display| Error::Config {
            origin: self.spec().name.clone(),
            reason: e.to_string(),
        };
        let spec = serde_json::to_string(self.spec()).map_err(|e| config(&e))?;
        let metadata = std::collections::HashMap::from([(SPEC_KEY.to_owned(), spec)]);
        let mut buffers = Vec::new();
        for (name, tensor) in self.state_dict()? {
            match precision {
                WeightPrecision::Int8 if tensor.rank() > 1 && name.ends_with("weight") => {
                    buffers.extend(Int8Matrix::round(&tensor)?.into_buffers(name));
                }
                WeightPrecision::F16 => buffers.push(half_buffer(name, &tensor)?),
                WeightPrecision::F32 | WeightPrecision::Int8 => {
                    buffers.push(float_buffer(name, &tensor)?);
                }
            }
        }
        let views = buffers
            .iter()
            .map(|(name, dtype, shape, bytes)| {
                Ok((name, TensorView::new(*dtype, shape.clone(), bytes)?))
            })
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
            .map_err(|e| config(&e))?;
        let bytes = safetensors::serialize(views, Some(metadata)).map_err(|e| config(&e))?;
        defend_files::seal(&bytes).map_err(|e| config(&e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Encoder;
    use crate::{Architecture, Backbone, Interpolation};
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
        std::fs::write(&path, vit.to_safetensors(WeightPrecision::F32)?).unwrap();
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
    fn eight_bits_are_read_back_as_the_same_bytes() -> Result<(), Error> {
        let vit = small();
        let bytes = vit.to_safetensors(WeightPrecision::Int8)?;
        let read = Vit::load(
            vit.spec().clone(),
            Weights::from_bytes(&bytes, "eight bits")?,
            TrainScope::Frozen,
            &Device::Cpu,
        )?;
        assert_eq!(read.to_safetensors(WeightPrecision::Int8)?, bytes);
        let full = vit.to_safetensors(WeightPrecision::F32)?;
        assert!(bytes.len() < full.len() / 2);

        // Each value is its integer times its row's scale, exactly.
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let name = "blocks.1.mlp.fc1.weight";
        let integers = file.tensor(name).unwrap();
        assert_eq!(integers.dtype(), safetensors::Dtype::I8);
        let scales = file.tensor(&format!("{name}.scale")).unwrap();
        let scale = |i: usize| {
            let [low, high] = [2 * i, 2 * i + 1].map(|j| u32::from(scales.data()[j]));
            f32::from_bits((high << 24) | (low << 16))
        };
        let (state, original) = (read.state_dict()?, vit.state_dict()?);
        let values = state[name].to_vec2::<f32>()?;
        for (i, row) in values.iter().enumerate() {
            for (j, value) in row.iter().enumerate() {
                let integer = integers.data()[i * row.len() + j] as i8;
                assert_eq!(*value, f32::from(integer) * scale(i), "{i} {j}");
            }
        }
        // Vectors, tokens and positions stay as they were.
        for name in ["pos_embed", "cls_token", "blocks.0.norm1.weight"] {
            let [read, original] = [&state, &original].map(|s| s[name].flatten_all());
            assert_eq!(read?.to_vec1::<f32>()?, original?.to_vec1::<f32>()?);
        }
        Ok(())
    }

    #[test]
    fn eight_bits_without_their_scales_are_refused_by_name() {
        let name = "blocks.0.attn.qkv.weight";
        let views = |scales: usize| {
            let bytes: &'static [u8] = &[0; 16];
            let view = |dtype, shape: Vec<usize>, n| TensorView::new(dtype, shape, &bytes[..n]);
            let matrix = view(safetensors::Dtype::I8, vec![4, 4], 16).unwrap();
            let scale = view(safetensors::Dtype::BF16, vec![scales], 2 * scales).unwrap();
            [(name.to_owned(), matrix), (format!("{name}.scale"), scale)]
        };
        for scales in [1, 3, 5] {
            let bytes = safetensors::serialize(views(scales), None).unwrap();
            let error = Weights::from_bytes(&bytes, "file").unwrap_err().to_string();
            assert!(error.contains("file") && error.contains(name), "{error}");
        }
        let [matrix, _] = views(4);
        let bytes = safetensors::serialize([matrix], None).unwrap();
        let error = Weights::from_bytes(&bytes, "file").unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{error}");
    }

    #[test]
    fn a_timm_folder_brings_its_normalisation() -> Result<(), Error> {
        let (folder, vit) = (tempfile::tempdir().unwrap(), small());
        std::fs::write(folder.path().join("config.json"), config()).unwrap();
        let file = folder.path().join("model.safetensors");
        candle_core::safetensors::save(&vit.state_dict()?, &file)?;
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
            let mut tensors = vit.state_dict().unwrap();
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
