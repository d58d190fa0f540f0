//! Where cached features are: in memory up to a limit, and in a folder.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::{ComputePrecision, Encoder, Error, Grid};

/// What is known of an image: CLS tokens, patch tokens and CLS attention, then the earlier layers' CLS and patch tokens.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) tensors: Vec<Tensor>,
    pub(crate) grid: Grid,
}

pub(crate) type Key = [u8; 32];

pub(crate) struct Store {
    pub(crate) folder: Option<PathBuf>,
    pub(crate) half: bool,
    pub(crate) memory: Mutex<Memory>,
}

pub(crate) struct Memory {
    pub(crate) entries: HashMap<Key, Entry>,
    pub(crate) free_bytes: usize,
}

/// Key of one block's tokens of an image.
pub(crate) fn block_key(image: &Key, block: usize) -> Key {
    let mut hasher = blake3::Hasher::new();
    hasher.update(image);
    hasher.update(&(block as u64).to_le_bytes());
    *hasher.finalize().as_bytes()
}

impl Store {
    pub(crate) fn memory(&self) -> std::sync::MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn get(&self, key: &Key, device: &Device) -> Option<Entry> {
        if let Some(entry) = self.memory().entries.get(key) {
            return Some(entry.clone());
        }
        // A file that cannot be read, or is not what this version writes, is computed again and replaced.
        let entry = read(&self.path(key)?, device)?;
        self.memory().put(key, &entry);
        Some(entry)
    }

    pub(crate) fn get_all(&self, keys: &[Key], device: &Device) -> Vec<Option<Entry>> {
        let get = |key| self.get(key, device);
        // On a GPU what another thread uploads is not ordered with what this one computes.
        if device.is_cpu() {
            keys.par_iter().map(get).collect()
        } else {
            keys.iter().map(get).collect()
        }
    }

    pub(crate) fn put(&self, key: &Key, entry: &Entry) -> Result<(), Error> {
        self.memory().put(key, entry);
        match self.path(key) {
            Some(path) => write(&path, entry),
            None => Ok(()),
        }
    }

    pub(crate) fn path(&self, key: &Key) -> Option<PathBuf> {
        let name = blake3::Hash::from(*key).to_hex();
        // Two levels: folders of a million files are slow.
        let folder = self.folder.as_ref()?.join(&name[..2]);
        Some(folder.join(format!("{name}.safetensors")))
    }
}

impl Memory {
    pub(crate) fn put(&mut self, key: &Key, entry: &Entry) {
        let size = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        let bytes: usize = entry.tensors.iter().map(size).sum();
        if bytes <= self.free_bytes && self.entries.insert(*key, entry.clone()).is_none() {
            self.free_bytes -= bytes;
        }
    }
}

/// Name of the grid's sides in a file.
const GRID: &str = "grid";

pub(crate) fn read(path: &Path, device: &Device) -> Option<Entry> {
    let bytes = std::fs::read(path).ok()?;
    defend_files::check_seal(&bytes, None).ok()?;
    let mut tensors = candle_core::safetensors::load_buffer(&bytes, device).ok()?;
    let sides = tensors.remove(GRID)?.to_vec1::<u32>().ok()?;
    let [rows, columns] = sides[..] else {
        return None;
    };
    let ordered = (0..tensors.len()).map(|i| tensors.remove(&i.to_string()));
    Some(Entry {
        tensors: ordered.collect::<Option<_>>()?,
        grid: Grid {
            rows: rows as usize,
            columns: columns as usize,
        },
    })
}

/// Writes a file that appears whole or not at all.
fn write(path: &Path, entry: &Entry) -> Result<(), Error> {
    let fault = |source| Error::Io {
        path: path.into(),
        source,
    };
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(fault)?;
    let named = entry.tensors.iter().enumerate();
    let mut tensors: HashMap<String, Tensor> =
        named.map(|(i, t)| (i.to_string(), t.clone())).collect();
    let sides = [entry.grid.rows as u32, entry.grid.columns as u32];
    tensors.insert(GRID.into(), Tensor::new(&sides, &Device::Cpu)?);
    defend_files::write_with(path, |file| {
        let bytes = safetensors::serialize(&tensors, None).map_err(std::io::Error::other)?;
        std::io::Write::write_all(file, &defend_files::seal(&bytes)?)
    })
    .map_err(fault)
}

/// One key an image, from its values.
pub(crate) fn keys(images: &Tensor) -> Result<Vec<Key>, Error> {
    let count = images.dim(0)?;
    let values = images
        .to_dtype(DType::F32)?
        .flatten_all()?
        .to_vec1::<f32>()?;
    let each = values.len() / count.max(1);
    let shape = format!("{:?} {:?}", &images.dims()[1..], images.dtype());
    let key = |image: &[f32]| {
        let mut hasher = blake3::Hasher::new();
        hasher.update(shape.as_bytes());
        hash_values(&mut hasher, image);
        *hasher.finalize().as_bytes()
    };
    Ok(values.par_chunks_exact(each.max(1)).map(key).collect())
}

fn hash_values(hasher: &mut blake3::Hasher, values: &[f32]) {
    // Many chunks at a time are what the hash is fast for.
    let mut bytes = vec![0; 1 << 16];
    for part in values.chunks(bytes.len() / 4) {
        for (slot, value) in bytes.chunks_exact_mut(4).zip(part) {
            slot.copy_from_slice(&value.to_le_bytes());
        }
        hasher.update(&bytes[..4 * part.len()]);
    }
}

/// Short hash of a backbone's architecture, weights and rounding: what its features depend on, wherever its file is.
///
/// # Errors
/// [`Error::Config`] for a backbone that does not show its tensors.
pub fn weights_hash(backbone: &dyn Encoder) -> Result<String, Error> {
    let spec = backbone.spec();
    let tensors = backbone.tensors()?.ok_or_else(|| Error::Config {
        origin: spec.name.clone(),
        reason: "it does not show its tensors, so that its features could be taken for another's"
            .into(),
    })?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("{:?}", spec.architecture).as_bytes());
    if spec.compute_precision != ComputePrecision::F32 {
        // On a CPU the tensors are `f32`, and less is rounded on the way.
        let dtypes: BTreeSet<&str> = tensors.values().map(|t| t.dtype().as_str()).collect();
        hasher.update(format!("{:?} {dtypes:?}", spec.compute_precision).as_bytes());
    }
    let mut names: Vec<&String> = tensors.keys().collect();
    names.sort_unstable();
    for name in names {
        hasher.update(name.as_bytes());
        let values = tensors[name].to_dtype(DType::F32)?.flatten_all()?;
        hash_values(&mut hasher, &values.to_vec1::<f32>()?);
    }
    Ok(hasher.finalize().to_hex()[..16].to_owned())
}
