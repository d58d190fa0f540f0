//! A detector in one file.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use defend_data::Preprocess;
use defend_vit::{Arithmetic, BackboneSpec, TrainScope, Vit, Weights};
use serde::{Deserialize, Serialize};

use crate::{Calibration, DefendConfig, Detector, Error, MapScale};

/// Metadata key of everything but the tensors.
const MODEL_KEY: &str = "defend.model";
/// Raised whenever files of an older version would be read wrongly.
const FORMAT_VERSION: u32 = 1;

/// What a model file says beside its tensors.
#[derive(Serialize, Deserialize)]
struct Header {
    format_version: u32,
    /// Version of the library that wrote the file.
    library_version: String,
    config: DefendConfig,
    teacher: BackboneSpec,
    student: BackboneSpec,
    preprocess: Preprocess,
    calibration: Option<Calibration>,
    map_scale: MapScale,
}

impl Detector {
    /// Writes the detector to one safetensors file, which appears whole or not at all.
    ///
    /// # Errors
    /// [`Error::NotSavable`] for a detector with roles of the user's own, [`Error::Io`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        if let Some(role) = self.custom {
            return Err(Error::NotSavable { role });
        }
        let header = Header {
            format_version: FORMAT_VERSION,
            library_version: env!("CARGO_PKG_VERSION").into(),
            config: self.config.clone(),
            teacher: self.teacher.spec().clone(),
            student: self.student.spec().clone(),
            preprocess: self.preprocess.clone(),
            calibration: self.calibration,
            map_scale: self.map_scale.clone(),
        };
        let mut tensors = BTreeMap::new();
        for (part, backbone) in [("teacher", &self.teacher), ("student", &self.student)] {
            let own = backbone
                .tensors()?
                .ok_or(Error::NotSavable { role: part })?;
            for (name, tensor) in own {
                let tensor = compact(&tensor.to_device(&Device::Cpu)?, backbone.spec())?;
                tensors.insert(format!("{part}.{name}"), tensor);
            }
        }
        let bytes = serialize(&header, &tensors).map_err(|reason| Error::Model {
            path: path.to_owned(),
            reason,
        })?;
        write_atomically(path, &bytes).map_err(|source| Error::Io {
            path: path.to_owned(),
            action: "writing the model",
            source,
        })
    }

    /// Reads a detector; it gives the same scores as the saved one, bit for bit on the same device.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Vit`] for damaged tensors, [`Error::Model`] for files that are no model of
    /// this library or of a newer version.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self, Error> {
        let path = path.as_ref();
        let wrong = |reason: String| Error::Model {
            path: path.to_owned(),
            reason,
        };
        let mut weights = Weights::read(path)?;
        let json = weights.metadata(MODEL_KEY).ok_or_else(|| {
            wrong(format!(
                "not a model of this library: no \"{MODEL_KEY}\" in its metadata"
            ))
        })?;
        let version: Version =
            serde_json::from_str(json).map_err(|e| wrong(format!("{MODEL_KEY}: {e}")))?;
        if version.format_version != FORMAT_VERSION {
            return Err(wrong(format!(
                "format version {} (written by {}), this library reads version {FORMAT_VERSION}",
                version.format_version, version.library_version
            )));
        }
        let header: Header =
            serde_json::from_str(json).map_err(|e| wrong(format!("{MODEL_KEY}: {e}")))?;
        header.config.validate()?;
        header.preprocess.validate()?;
        header.check_sizes().map_err(wrong)?;
        let (teacher, student) = (weights.split_off("teacher."), weights.split_off("student."));
        weights.finish()?;
        let load = |spec, weights| Vit::load(spec, weights, TrainScope::Frozen, device);
        Ok(Self {
            teacher: Arc::new(load(header.teacher, teacher)?),
            student: Arc::new(load(header.student, student)?),
            objective: Arc::new(header.config.distill.distance),
            score: Arc::new(header.config.aggregation),
            custom: None,
            config: header.config,
            preprocess: header.preprocess,
            device: device.clone(),
            calibration: header.calibration,
            map_scale: header.map_scale,
        })
    }
}

impl Header {
    /// Whether pictures, teacher and student fit each other.
    fn check_sizes(&self) -> Result<(), String> {
        let (teacher, student) = (&self.teacher.architecture, &self.student.architecture);
        let size = self.preprocess.size as usize;
        if teacher.image_size != size {
            return Err(format!(
                "pictures are resized to {size} px, but its teacher is for {} px",
                teacher.image_size
            ));
        }
        if (teacher.width, teacher.grid()) != (student.width, student.grid()) {
            return Err(format!(
                "the student has {} patches of width {}, expected the teacher's {} of width {}",
                student.grid().patches(),
                student.width,
                teacher.grid().patches(),
                teacher.width
            ));
        }
        let mapped = self.map_scale.usual.len();
        if mapped != teacher.grid().patches() {
            return Err(format!(
                "its map scale has {mapped} patches, expected {}",
                teacher.grid().patches()
            ));
        }
        Ok(())
    }
}

/// Weights of `bf16` in their own type, if nothing is lost by it.
fn compact(tensor: &Tensor, spec: &BackboneSpec) -> candle_core::Result<Tensor> {
    if spec.arithmetic == Arithmetic::F32 {
        return Ok(tensor.clone());
    }
    let compact = tensor.to_dtype(DType::BF16)?;
    let changed = compact.to_dtype(tensor.dtype())?.ne(tensor)?;
    let changed = changed.flatten_all()?.max(0)?.to_scalar::<u8>()?;
    Ok(if changed == 0 {
        compact
    } else {
        tensor.clone()
    })
}

/// The part of a header that every version has.
#[derive(Deserialize)]
struct Version {
    format_version: u32,
    library_version: String,
}

fn serialize(header: &Header, tensors: &BTreeMap<String, Tensor>) -> Result<Vec<u8>, String> {
    let json = serde_json::to_string(header).map_err(|e| e.to_string())?;
    let metadata = HashMap::from([(MODEL_KEY.to_owned(), json)]);
    safetensors::serialize(tensors, Some(metadata)).map_err(|e| e.to_string())
}

/// Writes beside the target and renames: a reader never sees half a file, and a failure leaves the old
/// one.
fn write_atomically(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut file = tempfile::Builder::new()
        .prefix(".defend-")
        .tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Temporary files are private; a model is as readable as any file.
        file.as_file()
            .set_permissions(std::fs::Permissions::from_mode(0o644))?;
    }
    file.persist(path)?;
    Ok(())
}
