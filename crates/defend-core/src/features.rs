//! What a teacher says of images, as a table for other tools.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Tensor};
use defend_data::{ClassId, ContentHash, Dataset, RgbImage, content_hash};
use defend_evidence::Embeddings;
use defend_vit::{Encoder, ImageSource};
use ndarray::Array2;
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};

use crate::background::Checked;
use crate::closed_fit::Fit;
use crate::detector::StudentStage;
use crate::files::{read, with_header, write};
use crate::fit::finish;
use crate::input::{preprocess_for, preprocess_of};
use crate::normals::Normals;
use crate::observer::Observer;
use crate::teacher::load_teacher;
use crate::tokens::TokenBlocks;
use crate::{
    DefendBuilder, Detector, Error, Fitted, ResizedImages, Skipped, Student, StudentReport,
    TeacherIdentity,
};

/// Metadata key of everything but the tensors.
const KEY: &str = "defend.features";
/// Raised whenever files of an older version would be read wrongly.
const FORMAT_VERSION: u32 = 1;
/// Names of the tensors: CLS tokens of the last two blocks and the mean patch token of the last, each after the final norm.
const PARTS: [&str; 3] = ["cls_before", "cls", "mean_patch"];
/// Limit of the memory for resized images: they are looked at once.
const IMAGE_BYTES: usize = 64 << 20;

/// Features of images by one teacher, with the images' names and content hashes.
#[derive(Debug, Clone, PartialEq)]
pub struct FeatureTable {
    teacher: TeacherIdentity,
    names: Vec<String>,
    hashes: Vec<String>,
    embeddings: Embeddings,
}

/// Hashes the images that are read, which are decoded once.
struct Hashed {
    images: Arc<dyn Dataset>,
    hashes: Mutex<HashMap<usize, ContentHash>>,
}

impl Dataset for Hashed {
    fn len(&self) -> usize {
        self.images.len()
    }

    fn name(&self, index: usize) -> Cow<'_, str> {
        self.images.name(index)
    }

    fn image(&self, index: usize) -> Result<RgbImage, defend_data::Error> {
        let image = self.images.image(index)?;
        let hash = content_hash(&image);
        let mut hashes = self.hashes.lock().unwrap_or_else(PoisonError::into_inner);
        hashes.insert(index, hash);
        Ok(image)
    }

    fn classes(&self, index: usize) -> &[ClassId] {
        self.images.classes(index)
    }

    fn class_names(&self) -> &[String] {
        self.images.class_names()
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format_version: u32,
    library_version: String,
    teacher: TeacherIdentity,
    names: Vec<String>,
    hashes: Vec<String>,
}

impl FeatureTable {
    pub(crate) fn collect(
        teacher: &dyn Encoder,
        identity: TeacherIdentity,
        images: &Arc<dyn Dataset>,
        (device, strict): (&Device, bool),
        observer: &mut dyn Observer,
    ) -> Result<(Self, Vec<Skipped>), Error> {
        let preprocess = preprocess_of(teacher.spec(), identity.resize_mode);
        let hashed = Arc::new(Hashed {
            images: Arc::clone(images),
            hashes: Mutex::new(HashMap::new()),
        });
        let images = ResizedImages::read(
            Arc::clone(&hashed) as Arc<dyn Dataset>,
            preprocess,
            device,
            IMAGE_BYTES,
            strict,
            observer,
        )?;
        let blocks = TokenBlocks::of_encoder(teacher);
        let embeddings = Normals::new(teacher, &blocks, &images).only_embeddings(observer)?;
        let skipped = images.skipped().to_vec();
        let names = (0..images.len()).map(|i| images.name(i)).collect();
        let hashes = hashed.hashes.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |i| hashes.get(&images.index(i)?).map(ToString::to_string);
        let hashes: Vec<String> = (0..images.len()).filter_map(of).collect();
        Ok((Self::new(identity, names, hashes, embeddings)?, skipped))
    }

    /// Of features that came another way, such as from a file format of your own; a name and a hash for each row.
    ///
    /// # Errors
    /// [`Error::Config`] for other numbers of names, hashes and rows.
    pub fn new(
        teacher: TeacherIdentity,
        names: Vec<String>,
        hashes: Vec<String>,
        embeddings: Embeddings,
    ) -> Result<Self, Error> {
        let rows = embeddings.len();
        if names.len() != rows || hashes.len() != rows {
            return Err(Error::Config {
                field: "features",
                value: format!(
                    "{} names, {} hashes and {rows} rows",
                    names.len(),
                    hashes.len()
                ),
                expected: "one of each for an image".into(),
            });
        }
        Ok(Self {
            teacher,
            names,
            hashes,
            embeddings,
        })
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// The teacher that looked at them.
    pub fn teacher(&self) -> &TeacherIdentity {
        &self.teacher
    }

    /// Names of the images.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// BLAKE3 of each image's size and pixels, in hexadecimal digits: equal images have equal ones, whatever their files are called.
    pub fn hashes(&self) -> &[String] {
        &self.hashes
    }

    /// The features: CLS tokens of the last two blocks and the mean patch token of the last, each `[images, D]`.
    pub fn embeddings(&self) -> &Embeddings {
        &self.embeddings
    }

    /// Refuses features of another teacher, or of another width than that of `teacher`, whose tokens are `width` wide.
    pub(crate) fn check(&self, teacher: &TeacherIdentity, width: usize) -> Result<(), Error> {
        let widths = vec![width; teacher.blocks.len() + 1];
        let found = self.embeddings.widths();
        if self.teacher.fits(teacher) && found == widths {
            return Ok(());
        }
        Err(Error::OtherFeatures {
            features: format!("{} with parts of {found:?} channels", self.teacher),
            teacher: format!("{teacher} with parts of {widths:?}"),
        })
    }

    /// Writes a safetensors file, which appears whole or not at all: `cls_before`, `cls` and `mean_patch` in `f32`, and `phi`: the
    /// three at unit length, joined, at unit length again. (The posterior weighs the first of them more, `posterior.first_part`.) Names and hashes are JSON in its metadata, under
    /// `defend.features`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        let fault = |reason: String| Error::Features {
            path: path.to_owned(),
            reason,
        };
        let header = Header {
            format_version: FORMAT_VERSION,
            library_version: env!("CARGO_PKG_VERSION").into(),
            teacher: self.teacher.clone(),
            names: self.names.clone(),
            hashes: self.hashes.clone(),
        };
        let json = serde_json::to_string(&header).map_err(|e| fault(e.to_string()))?;
        let parts = self.embeddings.parts().iter().cloned();
        let phi = self.embeddings.phi(1.0).mapv(|value| value as f32);
        let mut tensors = BTreeMap::new();
        // A teacher of a single block has no token before it.
        let names = &PARTS[PARTS.len().saturating_sub(parts.len())..];
        let named = names.iter().copied().zip(parts);
        for (name, rows) in named.chain([("phi", phi)]) {
            let shape = rows.dim();
            let tensor = Tensor::from_iter(rows, &Device::Cpu)?.reshape(shape)?;
            tensors.insert(name.to_owned(), tensor);
        }
        let metadata = HashMap::from([(KEY.to_owned(), json)]);
        let bytes =
            safetensors::serialize(&tensors, Some(metadata)).map_err(|e| fault(e.to_string()))?;
        write(path, &bytes, "writing the features")
    }

    /// Reads a file of [`FeatureTable::save`].
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Features`] for a file that is damaged or no table of features.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let fault = |reason: String| Error::Features {
            path: path.to_owned(),
            reason,
        };
        let bytes = read(path, "reading the features")?;
        let (tensors, header): (_, Header) = with_header(&bytes, KEY, "features").map_err(fault)?;
        if header.format_version != FORMAT_VERSION {
            return Err(fault(format!(
                "format version {} (written by {}), this library reads version {FORMAT_VERSION}",
                header.format_version, header.library_version
            )));
        }
        let part = |name: &str| -> Result<Option<Array2<f32>>, Error> {
            let Ok(tensor) = tensors.tensor(name) else {
                return Ok(None);
            };
            let wrong = || {
                fault(format!(
                    "\"{name}\" is no f32 matrix with a row for each of {} names",
                    header.names.len()
                ))
            };
            let (&[rows, columns], Dtype::F32) = (tensor.shape(), tensor.dtype()) else {
                return Err(wrong());
            };
            let values = tensor.data().as_chunks::<4>().0.iter();
            let values = values.map(|b| f32::from_le_bytes(*b)).collect();
            if rows != header.names.len() {
                return Err(wrong());
            }
            Ok(Some(
                Array2::from_shape_vec((rows, columns), values).map_err(|_| wrong())?,
            ))
        };
        let mut parts = Vec::new();
        for name in PARTS {
            parts.extend(part(name)?);
        }
        if parts.is_empty() || header.hashes.len() != header.names.len() {
            return Err(fault("features or hashes are missing".into()));
        }
        Ok(Self {
            teacher: header.teacher,
            names: header.names,
            hashes: header.hashes,
            embeddings: Embeddings::new(parts).map_err(|e| fault(e.to_string()))?,
        })
    }
}

impl DefendBuilder {
    /// What the builder's teacher says of some images, for your own tools and for [`DefendBuilder::fit_features`].
    ///
    /// # Errors
    /// [`Error::Config`] for settings that tune the teacher; as [`DefendBuilder::fit`].
    pub fn embed(
        self,
        images: impl Dataset + 'static,
        observer: &mut dyn Observer,
    ) -> Result<(FeatureTable, Vec<Skipped>), Error> {
        let config = self.untuned("features are those of a teacher that stays as it is")?;
        let teacher = load_teacher(self.teacher, &config, &self.device)?;
        let identity = TeacherIdentity::new(teacher.encoder(), config.resize_mode)?;
        let teacher = teacher.frozen_encoder(config.compute_precision)?;
        FeatureTable::collect(
            &*teacher,
            identity,
            &(Arc::new(images) as Arc<dyn Dataset>),
            (&self.device, self.strict),
            observer,
        )
    }

    /// As [`DefendBuilder::fit`] for the closed form, on features that were taken before. Such a detector has no maps of objects.
    ///
    /// # Errors
    /// [`Error::Config`] for a masked student, settings that tune the teacher, and features of images so alike that patches count;
    /// [`Error::OtherFeatures`] for those of another teacher; as [`DefendBuilder::fit`].
    pub fn fit_features(
        mut self,
        table: &FeatureTable,
        observer: &mut dyn Observer,
    ) -> Result<Fitted, Error> {
        let config = self.untuned("features are those of a teacher that stays as it is")?;
        self.check_roles()?;
        let Student::ClosedForm(evidence) = &config.student else {
            return Err(Error::Config {
                field: "student",
                value: "masked".into(),
                expected: "closed-form: a masked student learns from the images".into(),
            });
        };
        let (device, strict) = (self.device.clone(), self.strict);
        let (embedded, abnormal) = (self.teacher.is_none(), self.abnormal.take());
        let teacher = load_teacher(self.teacher.take(), &config, &device)?;
        let identity = TeacherIdentity::new(teacher.encoder(), config.resize_mode)?;
        table.check(&identity, teacher.encoder().spec().architecture.width)?;
        let background = Checked::new(
            std::mem::take(&mut self.background),
            || Ok(identity.clone()),
            false,
            embedded,
        )?;
        let preprocess = preprocess_for(teacher.encoder().spec(), &config)?;
        let teacher = teacher.frozen_encoder(config.compute_precision)?;
        let background =
            background.ready(&*teacher, config.resize_mode, (&device, strict), observer)?;
        let names = |image: usize| table.names().get(image).cloned().unwrap_or_default();
        let fit = Fit {
            images: table.embeddings(),
            names: &names,
            // Those of a table are of whole images.
            hashes: &|_| None,
            thumbnails: &|_| None,
            background: background.as_ref(),
            normals: None,
            faulty: None,
            config: evidence,
            seed: config.seed,
            drop_suspects: self.drop_suspects,
        };
        let blocks = TokenBlocks::of_encoder(&*teacher);
        let (student, report, map_scale) = fit.learn(teacher, blocks, observer)?;
        let mut detector = Detector {
            student: StudentStage::ClosedForm(Box::new(student)),
            config,
            preprocess,
            device,
            trained_on: Vec::new(),
            calibration: None,
            map_scale,
            custom_roles: Vec::new(),
        };
        let skipped = finish(&mut detector, abnormal, strict, observer)?;
        Ok(Fitted {
            detector,
            dense: None,
            student: StudentReport::ClosedForm(report),
            images: table.len(),
            skipped,
        })
    }
}
