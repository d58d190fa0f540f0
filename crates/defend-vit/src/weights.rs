//! Named tensors from a safetensors file, taken one by one with their shapes checked.

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;

use candle_core::{DType, Tensor};
use safetensors::SafeTensors;

use crate::{Error, int8, pytorch, shards};

/// The tensors of a weight file by name, as `f32` on the CPU, and the file's metadata.
#[derive(Debug, Clone)]
pub struct Weights {
    origin: String,
    tensors: HashMap<String, Tensor>,
    metadata: HashMap<String, String>,
}

impl Weights {
    /// Reads a weight file of safetensors or of `torch.save`, told by its content, or all parts of a model by its
    /// `*.index.json`.
    ///
    /// Pickles are read as data: nothing in them is called.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Damaged`].
    pub fn read(path: &Path) -> Result<Self, Error> {
        if path.extension().is_some_and(|e| e == "json") {
            return Self::read_shards(path);
        }
        let io = |source| Error::Io {
            path: path.to_owned(),
            source,
        };
        let origin = path.display().to_string();
        let mut start = Vec::new();
        let mut file = std::fs::File::open(path).map_err(io)?;
        file.by_ref()
            .take(512)
            .read_to_end(&mut start)
            .map_err(io)?;
        if let Some(reason) = in_place_of_weights(&start) {
            return Err(Error::Damaged { origin, reason });
        }
        let of_pytorch = ["pth", "pt", "bin"].map(std::ffi::OsStr::new);
        // The name counts where the content says nothing: safetensors begin with a length and JSON.
        let named = path.extension().is_some_and(|e| of_pytorch.contains(&e));
        if pytorch::is_pytorch(&start) || (named && start.get(8) != Some(&b'{')) {
            return match pytorch::read(path) {
                Ok(tensors) => Ok(Self::from_tensors(tensors, &origin)),
                Err(reason) => Err(Error::Damaged { origin, reason }),
            };
        }
        let bytes = std::fs::read(path).map_err(io)?;
        Self::from_bytes(&bytes, &origin)
    }

    /// Reads the files that an index names, all of them beside it.
    fn read_shards(index: &Path) -> Result<Self, Error> {
        let damaged = |reason: String| Error::Damaged {
            origin: index.display().to_string(),
            reason,
        };
        let weight_map = shards::weight_map(index)?;
        let mut tensors = HashMap::new();
        for file in shards::files(&weight_map) {
            tensors.extend(Self::read(&index.with_file_name(file))?.tensors);
        }
        if let Some((name, file)) = weight_map
            .iter()
            .find(|(name, _)| !tensors.contains_key(*name))
        {
            return Err(damaged(format!(
                "{file} has no tensor \"{name}\", which the index says it has"
            )));
        }
        tensors.retain(|name, _| weight_map.contains_key(name));
        Ok(Self::from_tensors(tensors, &index.display().to_string()))
    }

    /// Reads the content of a weight file, of safetensors or of `torch.save`; matrices in eight bits
    /// ([`WeightPrecision::Int8`](crate::WeightPrecision::Int8)) as the values that they stand for. `origin` names it in errors.
    ///
    /// # Errors
    /// [`Error::Damaged`] when the content is truncated or is no weight file.
    pub fn from_bytes(bytes: &[u8], origin: &str) -> Result<Self, Error> {
        let damaged = |reason: safetensors::SafeTensorError| Error::Damaged {
            origin: origin.to_owned(),
            reason: reason.to_string(),
        };
        if pytorch::is_pytorch(bytes) {
            let tensors = pytorch::read_from(std::io::Cursor::new(bytes));
            return match tensors {
                Ok(tensors) => Ok(Self::from_tensors(tensors, origin)),
                Err(reason) => Err(Error::Damaged {
                    origin: origin.to_owned(),
                    reason,
                }),
            };
        }
        // Files of others have no checksum.
        if defend_files::is_sealed(bytes) {
            defend_files::check_seal(bytes, None).map_err(|e| Error::Damaged {
                origin: origin.to_owned(),
                reason: e.to_string(),
            })?;
        }
        // Checks that the tensors cover the content exactly: a truncated file fails here.
        let file = SafeTensors::deserialize(bytes).map_err(damaged)?;
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
        Ok(Self {
            origin: origin.to_owned(),
            tensors: int8::read_tensors(&file, origin)?,
            metadata: header.metadata().clone().unwrap_or_default(),
        })
    }

    /// Weights from tensors in memory; `origin` names them in errors.
    pub fn from_tensors(tensors: HashMap<String, Tensor>, origin: &str) -> Self {
        Self {
            origin: origin.to_owned(),
            tensors,
            metadata: HashMap::new(),
        }
    }

    /// What the weights are called in errors.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// An entry of the file's metadata.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// Whether a tensor of this name is (still) there.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Shape of a tensor that is (still) there.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(Tensor::dims)
    }

    /// Names of the tensors that are (still) there, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The names in order, for errors.
    pub(crate) fn sorted_names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.tensors.keys().cloned().collect();
        names.sort();
        names
    }

    /// Renames every tensor.
    pub(crate) fn rename(&mut self, new_name: impl Fn(&str) -> String) {
        let tensors = std::mem::take(&mut self.tensors).into_iter();
        self.tensors = tensors.map(|(name, t)| (new_name(&name), t)).collect();
    }

    /// Drops the tensors that are not wanted.
    pub(crate) fn retain(&mut self, wanted: impl Fn(&str) -> bool) {
        self.tensors.retain(|name, _| wanted(name));
    }

    /// Adds a tensor.
    pub(crate) fn insert(&mut self, name: &str, tensor: Tensor) {
        self.tensors.insert(name.to_owned(), tensor);
    }

    /// Splits off the tensors whose names start with `prefix`, which is removed from the names.
    #[must_use]
    pub fn split_off(&mut self, prefix: &str) -> Self {
        let names: Vec<String> = self
            .tensors
            .keys()
            .filter(|name| name.starts_with(prefix))
            .cloned()
            .collect();
        let tensors = names
            .into_iter()
            .filter_map(|name| {
                let tensor = self.tensors.remove(&name)?;
                Some((name[prefix.len()..].to_owned(), tensor))
            })
            .collect();
        Self {
            origin: format!("{} ({prefix}*)", self.origin),
            tensors,
            metadata: HashMap::new(),
        }
    }

    /// Takes a tensor out.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::TensorShape`], [`Error::NonFiniteTensor`].
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, Error> {
        let Some(tensor) = self.tensors.remove(name) else {
            return Err(Error::MissingTensor {
                origin: self.origin.clone(),
                name: name.to_owned(),
                expected: shape.to_vec(),
            });
        };
        if tensor.dims() != shape {
            return Err(Error::TensorShape {
                origin: self.origin.clone(),
                name: name.to_owned(),
                found: tensor.dims().to_vec(),
                expected: shape.to_vec(),
            });
        }
        let values = tensor
            .flatten_all()?
            .to_dtype(DType::F32)?
            .to_vec1::<f32>()?;
        if values.iter().any(|v| !v.is_finite()) {
            return Err(Error::NonFiniteTensor {
                origin: self.origin.clone(),
                name: name.to_owned(),
            });
        }
        Ok(tensor)
    }

    /// Refuses weights of which something is left: they belong to another architecture.
    ///
    /// # Errors
    /// [`Error::UnknownTensors`] with the sorted names.
    pub fn finish(self) -> Result<(), Error> {
        if self.tensors.is_empty() {
            return Ok(());
        }
        Err(Error::UnknownTensors {
            names: self.sorted_names(),
            origin: self.origin,
        })
    }
}

/// What a file is that stands where weights should be.
fn in_place_of_weights(start: &[u8]) -> Option<String> {
    if start.is_empty() {
        return Some("it is empty".into());
    }
    if start.starts_with(b"version https://git-lfs") {
        return Some("it is a Git LFS pointer, the text that stands for a file: `git lfs pull` fetches the file".into());
    }
    let text = start.trim_ascii_start().to_ascii_lowercase();
    let page = [&b"<!doctype html"[..], b"<html"]
        .iter()
        .any(|tag| text.starts_with(tag));
    page.then(|| "it is an HTML page, as a failed download leaves it".into())
}
