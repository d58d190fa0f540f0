//! Files of `torch.save`: the archive that it writes today, and the bare stream of pickles that it wrote before version 1.6.

mod pickle;

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek};
use std::path::Path;

use candle_core::{Device, Tensor};
use half::{bf16, f16};

use pickle::{Id, Pickle, Value};

/// Where a training checkpoint keeps its state dict.
const STATE_DICT_KEYS: [&str; 4] = ["model", "teacher", "state_dict", "model_state_dict"];

/// First pickle of a file of before version 1.6, an integer of ten bytes.
const LEGACY_MAGIC: [u8; 14] = [
    0x80, 0x02, 0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19,
];

/// First bytes of a zip archive.
const ZIP_MAGIC: &[u8] = b"PK\x03\x04";

/// Whether the first bytes of a file are those of a file of `torch.save`.
pub(crate) fn is_pytorch(start: &[u8]) -> bool {
    start.starts_with(ZIP_MAGIC) || start.starts_with(&LEGACY_MAGIC[..4])
}

/// The state dict of a file of `torch.save`, as `f32` on the CPU; the error says what is wrong with it.
pub(crate) fn read(path: &Path) -> Result<HashMap<String, Tensor>, String> {
    let file = File::open(path).map_err(|e| e.to_string())?;
    read_from(BufReader::new(file))
}

/// As [`read`], from an open file or from bytes.
pub(crate) fn read_from(
    mut reader: impl BufRead + Seek,
) -> Result<HashMap<String, Tensor>, String> {
    let zip = reader
        .fill_buf()
        .map_err(|e| e.to_string())?
        .starts_with(ZIP_MAGIC);
    if zip { archive(reader) } else { legacy(reader) }
}

/// `data.pkl` and a file for each storage in `data/`.
fn archive(reader: impl Read + Seek) -> Result<HashMap<String, Tensor>, String> {
    let mut zip = zip::ZipArchive::new(reader).map_err(|e| e.to_string())?;
    // Entries over the same bytes would let a small file ask for much memory.
    if zip.has_overlapping_files().map_err(|e| e.to_string())? {
        return Err("entries of the archive lie over each other".into());
    }
    let index = (0..zip.len())
        .find(|&i| {
            let name = zip.name_for_index(i).and_then(Result::ok);
            name.is_some_and(|n| n.ends_with("data.pkl"))
        })
        .ok_or("the archive has no data.pkl")?;
    let (root, pickle) = {
        let entry = zip.by_index(index).map_err(|e| e.to_string())?;
        let name = entry.name().map_err(|e| e.to_string())?.into_owned();
        let root = name.strip_suffix("data.pkl").unwrap_or_default();
        (root.to_owned(), Pickle::read(&mut BufReader::new(entry))?)
    };
    if let Ok(mut order) = zip.by_name(&format!("{root}byteorder")) {
        let mut text = String::new();
        order
            .by_ref()
            .take(16)
            .read_to_string(&mut text)
            .map_err(|e| e.to_string())?;
        if text.trim() != "little" {
            return Err(format!("its byte order is {text:?}, expected \"little\""));
        }
    }
    let tensors = stored_tensors(&pickle)?;
    let mut storages = HashMap::new();
    for (_, tensor) in &tensors {
        let Storage { key, kind, values } = &tensor.storage;
        if storages.contains_key(key) {
            continue;
        }
        let name = format!("{root}data/{key}");
        let mut entry = zip.by_name(&name).map_err(|e| format!("{name}: {e}"))?;
        // PyTorch never compresses, and what is not compressed is no larger than the file.
        if entry.compression() != zip::CompressionMethod::Stored {
            return Err(format!(
                "{name} is compressed, which torch.save does not do"
            ));
        }
        let read = kind
            .read(&mut entry, *values)
            .map_err(|e| format!("{name}: {e}"))?;
        storages.insert(key.clone(), read);
    }
    assemble(tensors, &storages)
}

/// Magic number, version, properties of the system, the state dict, the keys of the storages, each storage behind its length.
fn legacy(mut reader: impl BufRead) -> Result<HashMap<String, Tensor>, String> {
    let mut magic = [0; LEGACY_MAGIC.len() + 1];
    reader.read_exact(&mut magic).map_err(|e| e.to_string())?;
    if magic[..LEGACY_MAGIC.len()] != LEGACY_MAGIC {
        return Err("it is neither an archive nor a stream of torch.save".into());
    }
    let (_version, _system) = (Pickle::read(&mut reader)?, Pickle::read(&mut reader)?);
    let pickle = Pickle::read(&mut reader)?;
    let tensors = stored_tensors(&pickle)?;
    // Every storage has to be read for those behind it, even if no tensor of the state dict is in it.
    let storages_by_key = storages_of(&pickle);
    let keys = Pickle::read(&mut reader)?;
    let keys = keys
        .sequence(keys.top)
        .and_then(|ids| {
            ids.iter()
                .map(|&id| keys.text(id))
                .collect::<Option<Vec<_>>>()
        })
        .ok_or("it does not list its storages")?;
    let mut storages = HashMap::new();
    for key in keys {
        let storage = storages_by_key
            .get(key)
            .ok_or_else(|| format!("the type of storage {key} is not known"))?;
        let mut length = [0; 8];
        reader
            .read_exact(&mut length)
            .map_err(|e| format!("storage {key}: {e}"))?;
        let length = usize::try_from(u64::from_le_bytes(length)).unwrap_or(usize::MAX);
        if length != storage.values {
            return Err(format!(
                "storage {key} has {length} values, expected {}",
                storage.values
            ));
        }
        let read = storage.kind.read(&mut reader, length);
        storages.insert(
            key.to_owned(),
            read.map_err(|e| format!("storage {key}: {e}"))?,
        );
    }
    assemble(tensors, &storages)
}

/// Type of the numbers in a storage.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    F32,
    F64,
    F16,
    Bf16,
    /// Integers and others, of so many bytes: no parameter of a network.
    NotFloat(usize),
}

impl Kind {
    fn new(class: &str) -> Option<Self> {
        Some(match class.strip_prefix("torch.")? {
            "FloatStorage" => Self::F32,
            "DoubleStorage" => Self::F64,
            "HalfStorage" => Self::F16,
            "BFloat16Storage" => Self::Bf16,
            "LongStorage" => Self::NotFloat(8),
            "IntStorage" => Self::NotFloat(4),
            "ShortStorage" => Self::NotFloat(2),
            "ByteStorage" | "CharStorage" | "BoolStorage" => Self::NotFloat(1),
            _ => return None,
        })
    }

    fn bytes(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::NotFloat(bytes) => bytes,
        }
    }

    /// The values of a storage; none where they are no floating-point numbers.
    fn read(self, reader: &mut impl Read, values: usize) -> Result<Vec<f32>, String> {
        let wanted = values
            .checked_mul(self.bytes())
            .ok_or("its length is impossible")?;
        // Not allocated at once: the length may be a lie.
        let mut bytes = Vec::new();
        let found = reader.take(wanted as u64).read_to_end(&mut bytes);
        let found = found.map_err(|e| e.to_string())?;
        if found != wanted {
            return Err(format!("it has {found} bytes, expected {wanted}"));
        }
        Ok(match self {
            Self::F32 => each(&bytes, f32::from_le_bytes),
            Self::F64 => each(&bytes, |b| f64::from_le_bytes(b) as f32),
            Self::F16 => each(&bytes, |b| f16::from_le_bytes(b).to_f32()),
            Self::Bf16 => each(&bytes, |b| bf16::from_le_bytes(b).to_f32()),
            Self::NotFloat(_) => Vec::new(),
        })
    }
}

/// The numbers in bytes, of `N` each.
fn each<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    let chunks = bytes.as_chunks().0.iter();
    chunks.map(|chunk| value(*chunk)).collect()
}

/// Numbers outside of the pickle.
#[derive(Debug, Clone, PartialEq)]
struct Storage {
    key: String,
    kind: Kind,
    values: usize,
}

/// A tensor as the pickle tells it: a view of a storage.
#[derive(Debug)]
struct StoredTensor {
    storage: Storage,
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

/// The floating-point tensors of the state dict.
fn stored_tensors(pickle: &Pickle) -> Result<Vec<(String, StoredTensor)>, String> {
    let inner = STATE_DICT_KEYS
        .iter()
        .filter_map(|key| pickle.entry(pickle.top, key));
    for dict in std::iter::once(pickle.top).chain(inner) {
        let mut tensors = Vec::new();
        for &(key, value) in pickle.dict(dict).unwrap_or_default() {
            let Some(name) = pickle.text(key) else {
                continue;
            };
            if let Some(view) = view(pickle, value) {
                let view = view.map_err(|reason| format!("tensor \"{name}\": {reason}"))?;
                if !matches!(view.storage.kind, Kind::NotFloat(_)) {
                    tensors.push((name.to_owned(), view));
                }
            }
        }
        if !tensors.is_empty() {
            return Ok(tensors);
        }
    }
    Err(match pickle.get(pickle.top) {
        Value::Dict(_) => format!(
            "no tensors at the top or under one of {}",
            STATE_DICT_KEYS.join(", ")
        ),
        _ => "it holds a whole pickled model or another object, expected a state dict (torch.save(model.state_dict(), file))".into(),
    })
}

/// What a call makes of a storage; `None` where it makes no tensor.
fn view(pickle: &Pickle, id: Id) -> Option<Result<StoredTensor, String>> {
    let (mut name, mut arguments) = pickle.call(id)?;
    // Parameters and tensors with attributes wrap the call that makes the tensor; no deeper than this.
    if name == "torch._utils._rebuild_parameter" {
        (name, arguments) = pickle.call(*arguments.first()?)?;
    } else if name == "torch._tensor._rebuild_from_type_v2" {
        let Value::Global(function) = pickle.get(*arguments.first()?) else {
            return None;
        };
        (name, arguments) = (function, pickle.sequence(*arguments.get(2)?)?);
    }
    if !name.starts_with("torch._utils._rebuild_tensor") {
        return None;
    }
    Some(strided(pickle, arguments))
}

fn strided(pickle: &Pickle, arguments: &[Id]) -> Result<StoredTensor, String> {
    let wrong =
        || "its storage, offset, shape or strides are not what torch.save writes".to_owned();
    let [persistent, offset, shape, strides, ..] = arguments else {
        return Err(wrong());
    };
    let Value::Persistent(storage) = pickle.get(*persistent) else {
        return Err(wrong());
    };
    Ok(StoredTensor {
        storage: storage_of(pickle, *storage)?,
        offset: pickle.size(*offset).ok_or_else(wrong)?,
        shape: pickle.sizes(*shape).ok_or_else(wrong)?,
        strides: pickle.sizes(*strides).ok_or_else(wrong)?,
    })
}

/// `("storage", type, key, device, values)`, in old files with a view of another storage behind it.
fn storage_of(pickle: &Pickle, id: Id) -> Result<Storage, String> {
    let parts = pickle.sequence(id).unwrap_or_default();
    let [_, class, key, _, values, rest @ ..] = parts else {
        return Err("its storage is not described as torch.save does".into());
    };
    let Value::Global(class) = pickle.get(*class) else {
        return Err("the type of its storage is not named".into());
    };
    let kind =
        Kind::new(class).ok_or_else(|| format!("storages of type {class} are not supported"))?;
    if rest.iter().any(|&id| pickle.get(id) != &Value::Other) {
        return Err("it is a view of another storage, saved by a PyTorch of before 0.4".into());
    }
    let key = pickle.text(*key).ok_or("its storage has no key")?;
    Ok(Storage {
        key: key.to_owned(),
        kind,
        values: pickle.size(*values).ok_or("its storage has no length")?,
    })
}

/// Every storage that the pickle refers to, by its key.
fn storages_of(pickle: &Pickle) -> HashMap<String, Storage> {
    let known = |id| storage_of(pickle, id).ok();
    let storages = pickle.persistent().filter_map(known);
    storages.map(|s| (s.key.clone(), s)).collect()
}

/// Cuts the tensors out of their storages.
fn assemble(
    tensors: Vec<(String, StoredTensor)>,
    storages: &HashMap<String, Vec<f32>>,
) -> Result<HashMap<String, Tensor>, String> {
    // Tensors may share a storage, a few times; a hostile file could ask for one many times.
    let stored: usize = storages.values().map(Vec::len).sum();
    let mut left = stored.saturating_mul(4);
    tensors
        .into_iter()
        .map(|(name, tensor)| {
            let values = storages
                .get(&tensor.storage.key)
                .map_or(&[][..], Vec::as_slice);
            let made = tensor.cut(values, &mut left);
            let tensor = made.map_err(|reason| format!("tensor \"{name}\": {reason}"))?;
            Ok((name, tensor))
        })
        .collect()
}

impl StoredTensor {
    /// `left`: how many values may still be copied.
    fn cut(self, storage: &[f32], left: &mut usize) -> Result<Tensor, String> {
        let Self {
            offset,
            shape,
            strides,
            ..
        } = self;
        let outside =
            || format!("shape {shape:?} with strides {strides:?} reaches outside of its storage");
        if shape.len() != strides.len() {
            return Err(outside());
        }
        let elements = shape
            .iter()
            .try_fold(1usize, |n, &extent| n.checked_mul(extent));
        let elements = elements.filter(|n| n <= left).ok_or_else(outside)?;
        *left -= elements;
        let last = shape
            .iter()
            .zip(&strides)
            .try_fold(offset, |at, (&extent, &stride)| {
                at.checked_add(extent.saturating_sub(1).checked_mul(stride)?)
            });
        if elements > 0 && last.is_none_or(|last| last >= storage.len()) {
            return Err(outside());
        }
        let mut values = Vec::with_capacity(elements);
        let mut index = vec![0; shape.len()];
        let mut at = offset;
        for _ in 0..elements {
            values.push(storage[at]);
            // The last dimension runs fastest.
            for dimension in (0..shape.len()).rev() {
                index[dimension] += 1;
                // A dimension of one may have any stride: what it adds is taken away again.
                at = at.wrapping_add(strides[dimension]);
                if index[dimension] < shape[dimension] {
                    break;
                }
                at = at.wrapping_sub(shape[dimension].wrapping_mul(strides[dimension]));
                index[dimension] = 0;
            }
        }
        Tensor::from_vec(values, shape, &Device::Cpu).map_err(|e| e.to_string())
    }
}
