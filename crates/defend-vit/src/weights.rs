//! Named tensors from a safetensors file, taken one by one with their shapes checked.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;

use crate::Error;

/// The tensors of a weight file by name, as `f32` on the CPU, and the file's metadata.
#[derive(Debug, Clone)]
pub struct Weights {
    origin: String,
    tensors: HashMap<String, Tensor>,
    metadata: HashMap<String, String>,
}

impl Weights {
    /// Reads a safetensors file.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Damaged`].
    pub fn read(path: &Path) -> Result<Self, Error> {
        let bytes = std::fs::read(path).map_err(|source| Error::Io {
            path: path.to_owned(),
            source,
        })?;
        Self::from_bytes(&bytes, &path.display().to_string())
    }

    /// Reads safetensors content; `origin` names it in errors.
    ///
    /// # Errors
    /// [`Error::Damaged`] when the content is truncated or is no safetensors file.
    pub fn from_bytes(bytes: &[u8], origin: &str) -> Result<Self, Error> {
        let damaged = |reason: safetensors::SafeTensorError| Error::Damaged {
            origin: origin.to_owned(),
            reason: reason.to_string(),
        };
        // Checks that the tensors cover the content exactly: a truncated file fails here.
        SafeTensors::deserialize(bytes).map_err(damaged)?;
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
        let tensors = candle_core::safetensors::load_buffer(bytes, &Device::Cpu)?
            .into_iter()
            .map(|(name, tensor)| Ok((name, tensor.to_dtype(DType::F32)?)))
            .collect::<Result<_, Error>>()?;
        Ok(Self {
            origin: origin.to_owned(),
            tensors,
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
        let mut names: Vec<String> = self.tensors.into_keys().collect();
        names.sort();
        Err(Error::UnknownTensors {
            origin: self.origin,
            names,
        })
    }
}
