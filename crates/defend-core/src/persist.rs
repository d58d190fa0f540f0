//! A detector in one file.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use defend_data::Preprocess;
use defend_evidence::{ClosedForm, State, StateArray, StateHeader};
use defend_files::check_seal;
use defend_vit::{BackboneSpec, ComputePrecision, Encoder, TrainScope, Vit, Weights};
use ndarray::Array2;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};

use crate::closed_form::ClosedFormStudent;
use crate::config::ConfigOfFormat1;
use crate::detector::StudentStage;
use crate::files::{read, write};
use crate::input::tiling_of;
use crate::masked::MaskedStudent;
use crate::normal_images;
use crate::tokens::TokenBlocks;
use crate::{Calibration, DefendConfig, Detector, Error, MapScale, Student};

/// Metadata key of everything but the tensors.
const MODEL_KEY: &str = "defend.model";
/// Raised whenever files of an older version would be read wrongly.
const FORMAT_VERSION: u32 = 2;
/// Bytes in which a model file names [`MODEL_KEY`]: metadata comes first.
const HEADER_START: usize = 1 << 12;
/// Names of the closed form's arrays begin so.
const EVIDENCE: &str = "evidence.";
/// Names of what is kept of the normal images begin so.
const NORMALS: &str = "normals.";

/// A setting that earlier versions saved, of what they kept for maps.
const NO_SETTING_ANY_MORE: &str = "core_for_maps";

/// Removes a field wherever it is.
fn forget(json: &mut serde_json::Value, field: &str) {
    match json {
        serde_json::Value::Object(fields) => {
            fields.remove(field);
            for value in fields.values_mut() {
                forget(value, field);
            }
        }
        serde_json::Value::Array(values) => {
            for value in values {
                forget(value, field);
            }
        }
        _ => (),
    }
}

/// What a model file says beside its tensors.
#[derive(Serialize, Deserialize)]
struct Header {
    format_version: u32,
    /// Version of the library that wrote the file.
    library_version: String,
    config: DefendConfig,
    teacher: BackboneSpec,
    student: StudentHeader,
    preprocess: Preprocess,
    calibration: Option<Calibration>,
    map_scale: MapScale,
    /// Roles that custom parts had in the fit.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    custom_roles: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum StudentHeader {
    ClosedForm {
        evidence: Box<StateHeader>,
        /// Names of the kept normal images.
        names: Vec<String>,
    },
    Masked(BackboneSpec),
}

/// The header of format 1, which had the masked student alone.
#[derive(Deserialize)]
struct HeaderOfFormat1 {
    library_version: String,
    config: ConfigOfFormat1,
    teacher: BackboneSpec,
    student: BackboneSpec,
    preprocess: Preprocess,
    calibration: Option<Calibration>,
    map_scale: MapScale,
}

impl From<HeaderOfFormat1> for Header {
    fn from(old: HeaderOfFormat1) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            library_version: old.library_version,
            config: old.config.into(),
            teacher: old.teacher,
            student: StudentHeader::Masked(old.student),
            preprocess: old.preprocess,
            calibration: old.calibration,
            map_scale: old.map_scale,
            custom_roles: Vec::new(),
        }
    }
}

impl Detector {
    /// Writes the detector to one safetensors file, which appears whole or not at all.
    ///
    /// # Errors
    /// [`Error::NotSavable`] for a detector with custom roles that a file cannot hold, [`Error::Io`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        let mut tensors = BTreeMap::new();
        let mut add = |part: &'static str, network: &dyn Encoder| -> Result<(), Error> {
            let own = network.tensors()?.ok_or(Error::NotSavable { role: part })?;
            for (name, tensor) in own {
                let tensor = compact(&tensor.to_device(&Device::Cpu)?, network.spec())?;
                tensors.insert(format!("{part}.{name}"), tensor);
            }
            Ok(())
        };
        let student = match &self.student {
            StudentStage::Masked(masked) => {
                if let Some(&role) = masked.custom.first() {
                    return Err(Error::NotSavable { role });
                }
                add("teacher", &*masked.teacher)?;
                add("student", &*masked.student)?;
                StudentHeader::Masked(masked.student.spec().clone())
            }
            StudentStage::ClosedForm(closed) => {
                add("teacher", &*closed.teacher)?;
                let State { header, arrays } = closed.evidence.state();
                for (name, array) in arrays {
                    tensors.insert(format!("{EVIDENCE}{name}"), to_tensor(array)?);
                }
                StudentHeader::ClosedForm {
                    evidence: Box::new(header),
                    names: self.normal_names().map(str::to_owned).collect(),
                }
            }
        };
        let (kept, others) = match &self.student {
            StudentStage::ClosedForm(closed) => (&closed.normals[..], &closed.others),
            StudentStage::Masked(_) => (&[][..], &self.trained_on),
        };
        for (name, bytes) in normal_images::to_bytes(kept, others) {
            let tensor = Tensor::new(bytes, &Device::Cpu)?;
            tensors.insert(format!("{NORMALS}{name}"), tensor);
        }
        let header = Header {
            format_version: FORMAT_VERSION,
            library_version: env!("CARGO_PKG_VERSION").into(),
            config: self.config.clone(),
            teacher: self.teacher().spec().clone(),
            student,
            preprocess: self.preprocess.clone(),
            calibration: self.calibration.clone(),
            map_scale: self.map_scale.clone(),
            custom_roles: self.custom_roles.clone(),
        };
        let bytes = serialize(&header, &tensors).map_err(|reason| Error::Model {
            path: path.to_owned(),
            reason,
        })?;
        write(path, &bytes, "writing the model")
    }

    /// Reads a detector; it gives the same scores as the saved one, bit for bit on the same device.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Vit`] for damaged tensors, [`Error::Model`] for files that are no model of
    /// this library or of a newer version.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self, Error> {
        let path = path.as_ref();
        let bytes = read(path, "reading the model")?;
        Self::from_bytes(&bytes, path, device)
    }

    /// Reads the content of a file of [`Detector::save`], such as a model compiled into a program; `path` names it in errors.
    ///
    /// # Errors
    /// As [`Detector::load`].
    pub fn from_bytes(
        bytes: &[u8],
        path: impl AsRef<Path>,
        device: &Device,
    ) -> Result<Self, Error> {
        let path = path.as_ref();
        let wrong = |reason: String| Error::Model {
            path: path.to_owned(),
            reason,
        };
        let start = bytes.get(..HEADER_START).unwrap_or(bytes);
        if !start
            .windows(MODEL_KEY.len())
            .any(|part| part == MODEL_KEY.as_bytes())
        {
            return Err(wrong("this is no model of defend".into()));
        }
        check_seal(bytes, Some(MODEL_KEY)).map_err(|e| wrong(e.to_string()))?;
        let mut weights = Weights::from_bytes(bytes, &path.display().to_string())?;
        let header = Header::read(&weights).map_err(wrong)?;
        header.config.validate()?;
        header.preprocess.validate()?;
        header.check_sizes().map_err(wrong)?;
        let (teacher, student, evidence) = (
            weights.split_off("teacher."),
            weights.split_off("student."),
            weights.split_off(EVIDENCE),
        );
        let _ = weights.split_off(NORMALS);
        let kept = bytes_of(bytes).map_err(wrong)?;
        weights.finish()?;
        let load = |spec, weights| -> Result<Arc<Vit>, Error> {
            Ok(Arc::new(Vit::load(
                spec,
                weights,
                TrainScope::Frozen,
                device,
            )?))
        };
        let mut trained_on = Vec::new();
        let student = match (header.student, &header.config.student) {
            (StudentHeader::Masked(spec), Student::Masked(settings)) => {
                evidence.finish()?;
                trained_on = normal_images::from_bytes(Vec::new(), &kept)
                    .map_err(wrong)?
                    .1;
                let (teacher, student) = (load(header.teacher, teacher)?, load(spec, student)?);
                StudentStage::Masked(MaskedStudent::new(teacher, student, settings))
            }
            (StudentHeader::ClosedForm { evidence, names }, Student::ClosedForm(_)) => {
                student.finish()?;
                let arrays = arrays_of(bytes).map_err(wrong)?;
                let state = State {
                    header: *evidence,
                    arrays,
                };
                let evidence = ClosedForm::from_state(state).map_err(|e| wrong(e.to_string()))?;
                let blocks = TokenBlocks::new(header.teacher.architecture.depth)
                    .in_tiles(tiling_of(&header.teacher, &header.config));
                let widths = vec![header.teacher.architecture.width; blocks.last().len() + 1];
                if evidence.widths() != widths || evidence.groups().of.len() != names.len() {
                    return Err(wrong(
                        "its normal images do not fit its teacher or their names".into(),
                    ));
                }
                let (normals, others) = normal_images::from_bytes(names, &kept).map_err(wrong)?;
                StudentStage::ClosedForm(Box::new(ClosedFormStudent {
                    teacher: load(header.teacher, teacher)?,
                    blocks,
                    evidence,
                    normals,
                    others,
                }))
            }
            _ => {
                return Err(wrong(
                    "its settings are of another student than its tensors".into(),
                ));
            }
        };
        Ok(Self {
            student,
            config: DefendConfig {
                // Models of earlier versions decode whole images.
                reduced_decoding: header.preprocess.reduced_decoding,
                ..header.config
            },
            preprocess: header.preprocess,
            device: device.clone(),
            calibration: header.calibration,
            map_scale: header.map_scale,
            trained_on,
            custom_roles: header.custom_roles,
        })
    }
}

/// What the file holds of the normal images, in bytes.
fn bytes_of(bytes: &[u8]) -> Result<BTreeMap<String, Vec<u8>>, String> {
    let all = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
    let mut parts = BTreeMap::new();
    for (name, view) in all.tensors() {
        let Some(part) = name.strip_prefix(NORMALS) else {
            continue;
        };
        if view.dtype() != Dtype::U8 {
            return Err(format!(
                "tensor \"{name}\" holds {:?}, expected bytes",
                view.dtype()
            ));
        }
        parts.insert(part.to_owned(), view.data().to_vec());
    }
    Ok(parts)
}

fn to_tensor(array: StateArray) -> Result<Tensor, Error> {
    let cpu = Device::Cpu;
    Ok(match array {
        StateArray::Matrix(matrix) => {
            let shape = matrix.dim();
            Tensor::from_iter(matrix, &cpu)?.reshape(shape)?
        }
        StateArray::Numbers(numbers) => Tensor::new(numbers, &cpu)?,
        StateArray::Indices(indices) => Tensor::new(indices, &cpu)?,
    })
}

/// The closed form's arrays in the types that they were written in: [`Weights`] are all `f32`.
fn arrays_of(bytes: &[u8]) -> Result<BTreeMap<String, StateArray>, String> {
    let all = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
    let mut arrays = BTreeMap::new();
    for (name, view) in all.tensors() {
        let Some(name) = name.strip_prefix(EVIDENCE) else {
            continue;
        };
        let (data, wrong) = (view.data(), || {
            format!("tensor \"{EVIDENCE}{name}\" has another type or shape than expected")
        });
        let four = || data.as_chunks::<4>().0.iter();
        let array = match (view.dtype(), view.shape()) {
            (Dtype::F32, &[rows, columns]) => {
                let values = four().map(|b| f32::from_le_bytes(*b)).collect();
                StateArray::Matrix(
                    Array2::from_shape_vec((rows, columns), values).map_err(|_| wrong())?,
                )
            }
            (Dtype::F64, [_]) => StateArray::Numbers(
                data.as_chunks::<8>()
                    .0
                    .iter()
                    .map(|b| f64::from_le_bytes(*b))
                    .collect(),
            ),
            (Dtype::U32, [_]) => {
                StateArray::Indices(four().map(|b| u32::from_le_bytes(*b)).collect())
            }
            _ => return Err(wrong()),
        };
        arrays.insert(name.to_owned(), array);
    }
    Ok(arrays)
}

impl Header {
    /// The header of this version or of an earlier one.
    fn read(weights: &Weights) -> Result<Self, String> {
        let json = weights
            .metadata(MODEL_KEY)
            .ok_or_else(|| format!("no \"{MODEL_KEY}\" in its metadata"))?;
        let fault = |e: serde_json::Error| format!("{MODEL_KEY}: {e}");
        let version: Version = serde_json::from_str(json).map_err(fault)?;
        match version.format_version {
            1 => Ok(serde_json::from_str::<HeaderOfFormat1>(json)
                .map_err(fault)?
                .into()),
            FORMAT_VERSION => {
                let mut json: serde_json::Value = serde_json::from_str(json).map_err(fault)?;
                forget(&mut json, NO_SETTING_ANY_MORE);
                serde_json::from_value(json).map_err(fault)
            }
            other => Err(format!(
                "format version {other} (written by {}), this library reads versions 1 to {FORMAT_VERSION}",
                version.library_version
            )),
        }
    }

    /// Whether images, teacher and student fit each other.
    fn check_sizes(&self) -> Result<(), String> {
        let teacher = &self.teacher.architecture;
        let (width, height) = self.preprocess.input_size();
        let (width, height) = (width as usize, height as usize);
        let (grid, side) = (teacher.grid(), teacher.image_size);
        let tiling = tiling_of(&self.teacher, &self.config);
        let (expected, grid) = match &tiling {
            Some(tiling) => (tiling.input_size(), tiling.grid()),
            None => ((side, side), grid),
        };
        if (width, height) != expected {
            return Err(format!(
                "images are resized to {width} x {height} px, but its teacher is for {} x {} px",
                expected.0, expected.1
            ));
        }
        if let StudentHeader::Masked(student) = &self.student
            && (teacher.width, teacher.grid())
                != (student.architecture.width, student.architecture.grid())
        {
            let student = &student.architecture;
            return Err(format!(
                "the student has {} patches of width {}, expected the teacher's {} of width {}",
                student.grid().patches(),
                student.width,
                teacher.grid().patches(),
                teacher.width
            ));
        }
        let mapped = self.map_scale.usual.len();
        if mapped != grid.patches() {
            return Err(format!(
                "its map scale has {mapped} patches, expected {}",
                grid.patches()
            ));
        }
        Ok(())
    }
}

/// Weights of `bf16` in their own type, if nothing is lost by it.
fn compact(tensor: &Tensor, spec: &BackboneSpec) -> candle_core::Result<Tensor> {
    if spec.compute_precision == ComputePrecision::F32 {
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
