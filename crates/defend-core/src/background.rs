//! What ordinary photos look like to a teacher.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use candle_core::Device;
use defend_data::{Dataset, ResizeMode};
use defend_evidence::{Embeddings, PatchTokens};
use defend_nn::Rng;
use defend_vit::{Encoder, ImageSource, weights_hash};
use ndarray::{Array2, Axis};
use rand::seq::index::sample;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use crate::files::{read, with_header, write};
use crate::input::preprocess_of;
use crate::normals::Normals;
use crate::observer::{Observer, Stage};
use crate::teacher::load_teacher;
use crate::tokens::{TokenBlocks, Wanted};
use crate::{DefendBuilder, Error, ResizedImages};

/// Metadata key of everything but the tensors.
const KEY: &str = "defend.background";
/// Tensor of what is around some patches.
const PLACES: &str = "places";
/// Raised whenever files of an older version would be read wrongly.
const FORMAT_VERSION: u32 = 2;
/// The version that kept patch tokens of the last block, which maps of objects cannot use.
const WITHOUT_PLACES: u32 = 1;
/// Places that are kept of each photo.
const PLACES_A_PHOTO: usize = 1;
/// Stream of the random choice of these.
const PLACE_STREAM: u64 = 4;
/// Limit of the memory for resized photos: they are looked at once.
const IMAGE_BYTES: usize = 64 << 20;

/// What the tokens of a background depend on, beside the photos.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TeacherIdentity {
    /// The teacher's name, for messages.
    pub name: String,
    /// Hash of its architecture and weights.
    pub weights: String,
    /// Side of the images, pixels.
    pub image_size: usize,
    /// How images become square.
    #[serde(alias = "fit")]
    pub resize_mode: ResizeMode,
    /// Blocks whose tokens are kept.
    pub blocks: Vec<usize>,
}

impl TeacherIdentity {
    /// Of a teacher that does not change any more.
    ///
    /// # Errors
    /// [`Error::Vit`] for a teacher that does not show its tensors.
    pub(crate) fn new(teacher: &dyn Encoder, resize_mode: ResizeMode) -> Result<Self, Error> {
        Ok(Self::with_weights(
            teacher,
            resize_mode,
            weights_hash(teacher)?,
        ))
    }

    fn with_weights(teacher: &dyn Encoder, resize_mode: ResizeMode, weights: String) -> Self {
        let spec = teacher.spec();
        Self {
            name: spec.name.clone(),
            weights,
            image_size: spec.architecture.image_size,
            resize_mode,
            blocks: TokenBlocks::of_encoder(teacher).last().to_vec(),
        }
    }

    /// Whether tokens of the other teacher are comparable; names do not count.
    pub(crate) fn fits(&self, other: &Self) -> bool {
        (
            &self.weights,
            self.image_size,
            self.resize_mode,
            &self.blocks,
        ) == (
            &other.weights,
            other.image_size,
            other.resize_mode,
            &other.blocks,
        )
    }
}

impl std::fmt::Display for TeacherIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            name,
            weights,
            image_size,
            resize_mode,
            ..
        } = self;
        write!(
            f,
            "{name} (weights {weights}, {image_size} px, {resize_mode:?})"
        )
    }
}

/// Tokens of ordinary photos, in eight bits a value: a few KB of each photo, of which no image can be made.
///
/// The contrast of the closed form compares with them. They should be real photographs of the size that is scored, the more
/// various the better; a thousand are enough.
#[derive(Debug, Clone, PartialEq)]
pub struct Background {
    teacher: TeacherIdentity,
    source: String,
    parts: Vec<Quantized>,
    places: Option<Quantized>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format_version: u32,
    library_version: String,
    teacher: TeacherIdentity,
    photos: usize,
    source: String,
}

/// Rows of whole numbers in `-127..=127`, each with a scale.
#[derive(Debug, Clone, PartialEq)]
struct Quantized {
    values: Array2<i8>,
    scales: Vec<f32>,
}

impl Quantized {
    fn new(rows: &Array2<f32>) -> Self {
        let scale = |row: ndarray::ArrayView1<'_, f32>| {
            let largest = row.iter().fold(0f32, |top, v| top.max(v.abs()));
            if largest > 0.0 { largest / 127.0 } else { 1.0 }
        };
        let scales: Vec<f32> = rows.rows().into_iter().map(scale).collect();
        let mut values = Array2::zeros(rows.dim());
        for ((mut target, row), scale) in
            values.rows_mut().into_iter().zip(rows.rows()).zip(&scales)
        {
            target.zip_mut_with(&row, |t: &mut i8, v| *t = (v / scale).round() as i8);
        }
        Self { values, scales }
    }

    fn restored(&self) -> Array2<f32> {
        let mut rows = self.values.mapv(f32::from);
        for (mut row, scale) in rows.rows_mut().into_iter().zip(&self.scales) {
            row.mapv_inplace(|v| v * scale);
        }
        rows
    }
}

impl Background {
    /// Looks at ordinary photos with a teacher; `identity`: of its weights before they were rounded.
    pub(crate) fn collect(
        teacher: &dyn Encoder,
        identity: TeacherIdentity,
        photos: &Arc<dyn Dataset>,
        source: String,
        (device, strict): (&Device, bool),
        observer: &mut dyn Observer,
    ) -> Result<Self, Error> {
        let preprocess = preprocess_of(teacher.spec(), identity.resize_mode);
        let images = ResizedImages::read(
            Arc::clone(photos),
            preprocess,
            device,
            IMAGE_BYTES,
            strict,
            observer,
        )?;
        let blocks = TokenBlocks::of_encoder(teacher);
        let mut rng = Rng::stream(0, PLACE_STREAM);
        let (mut batches, mut places) = (Vec::new(), Vec::new());
        let all: Vec<usize> = (0..images.len()).collect();
        let teacher_pass = Normals::new(teacher, &blocks, &images);
        let wanted = Wanted {
            patches: false,
            places: true,
        };
        teacher_pass.pass(
            &all,
            |_| wanted,
            Stage::Background,
            observer,
            |embedded| {
                batches.push(embedded.images);
                for block in embedded.places.iter().flat_map(PatchTokens::blocks) {
                    for image in block.axis_iter(Axis(0)) {
                        let some =
                            sample(&mut rng, image.nrows(), PLACES_A_PHOTO.min(image.nrows()));
                        places.push(image.select(Axis(0), &some.into_vec()));
                    }
                }
                Ok(())
            },
        )?;
        let views: Vec<_> = places.iter().map(|rows| rows.view()).collect();
        let places = ndarray::concatenate(Axis(0), &views).map_err(candle_core::Error::msg)?;
        let images = Embeddings::joined(&batches)?;
        Ok(Self {
            teacher: identity,
            source,
            parts: images.parts().iter().map(Quantized::new).collect(),
            places: Some(Quantized::new(&places)),
        })
    }

    /// Number of photos.
    pub fn photos(&self) -> usize {
        self.parts.first().map_or(0, |part| part.scales.len())
    }

    /// Where the photos are from.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The teacher that looked at them.
    pub fn teacher(&self) -> &TeacherIdentity {
        &self.teacher
    }

    /// The photos' tokens as the closed form takes them: CLS tokens of the last two blocks and the mean patch token, each
    /// `[photos, D]`, for [`ClosedForm::fit`](defend_evidence::ClosedForm::fit).
    ///
    /// # Errors
    /// [`Error::Evidence`] for tokens that are no finite numbers.
    pub fn embeddings(&self) -> Result<Embeddings, Error> {
        Ok(Embeddings::new(
            self.parts.iter().map(Quantized::restored).collect(),
        )?)
    }

    /// What is around some patches of the photos, unit rows `[places, D]`, for
    /// [`ClosedForm::remember_objects`](defend_evidence::ClosedForm::remember_objects); `None` in a file of an earlier version.
    ///
    /// # Errors
    /// [`Error::Evidence`] for tokens that are no finite numbers.
    pub fn places(&self) -> Result<Option<Array2<f32>>, Error> {
        let Some(places) = &self.places else {
            return Ok(None);
        };
        let places = PatchTokens::new(vec![places.restored().insert_axis(Axis(0))])?;
        let unit = places.blocks().first();
        Ok(unit.map(|block| block.index_axis(Axis(0), 0).to_owned()))
    }

    /// Writes a safetensors file, which appears whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        let header = Header {
            format_version: if self.places.is_some() {
                FORMAT_VERSION
            } else {
                WITHOUT_PLACES
            },
            library_version: env!("CARGO_PKG_VERSION").into(),
            teacher: self.teacher.clone(),
            photos: self.photos(),
            source: self.source.clone(),
        };
        let fault = |reason: String| Error::Background {
            origin: path.display().to_string(),
            reason,
        };
        let json = serde_json::to_string(&header).map_err(|e| fault(e.to_string()))?;
        let named = self
            .parts
            .iter()
            .enumerate()
            .map(|(i, part)| (format!("part.{i}"), part));
        let mut buffers: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> = BTreeMap::new();
        let places = self.places.iter().map(|rows| (PLACES.to_owned(), rows));
        for (name, rows) in named.chain(places) {
            let bytes = rows.values.iter().map(|v| v.to_ne_bytes()[0]).collect();
            let scales: Vec<u8> = rows.scales.iter().flat_map(|s| s.to_le_bytes()).collect();
            buffers.insert(
                format!("{name}.scale"),
                (Dtype::F32, vec![rows.scales.len()], scales),
            );
            buffers.insert(name, (Dtype::I8, rows.values.shape().to_vec(), bytes));
        }
        let views = buffers.iter().map(|(name, (dtype, shape, bytes))| {
            TensorView::new(*dtype, shape.clone(), bytes).map(|view| (name.clone(), view))
        });
        let views: Vec<_> = views
            .collect::<Result<_, _>>()
            .map_err(|e| fault(e.to_string()))?;
        let metadata = HashMap::from([(KEY.to_owned(), json)]);
        let bytes =
            safetensors::serialize(views, Some(metadata)).map_err(|e| fault(e.to_string()))?;
        write(path, &bytes, "writing the background")
    }

    /// Reads a file of [`Background::save`].
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Background`] for a file that is damaged or no background.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let bytes = read(path, "reading the background")?;
        Self::from_bytes(&bytes, &path.display().to_string())
    }

    /// Reads the content of a file of [`Background::save`]; `origin` names it in errors.
    ///
    /// # Errors
    /// [`Error::Background`] for content that is damaged or no background.
    pub fn from_bytes(bytes: &[u8], origin: &str) -> Result<Self, Error> {
        let fault = |reason: String| Error::Background {
            origin: origin.to_owned(),
            reason,
        };
        let (tensors, header): (_, Header) =
            with_header(bytes, KEY, "background").map_err(fault)?;
        let old = header.format_version == WITHOUT_PLACES;
        if !old && header.format_version != FORMAT_VERSION {
            return Err(fault(format!(
                "format version {} (written by {}), this library reads versions {WITHOUT_PLACES} and {FORMAT_VERSION}",
                header.format_version, header.library_version
            )));
        }
        let rows = |name: &str| -> Result<Option<Quantized>, Error> {
            let (Ok(values), Ok(scales)) = (
                tensors.tensor(name),
                tensors.tensor(&format!("{name}.scale")),
            ) else {
                return Ok(None);
            };
            let wrong = || {
                fault(format!(
                    "\"{name}\" is no matrix of eight-bit numbers with a scale for each row"
                ))
            };
            let (&[r, c], Dtype::I8, Dtype::F32) = (values.shape(), values.dtype(), scales.dtype())
            else {
                return Err(wrong());
            };
            let numbers = values
                .data()
                .iter()
                .map(|b| i8::from_ne_bytes([*b]))
                .collect();
            let scales: Vec<f32> = scales
                .data()
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect();
            if scales.len() != r || !scales.iter().all(|s| s.is_finite() && *s > 0.0) {
                return Err(wrong());
            }
            let values = Array2::from_shape_vec((r, c), numbers).map_err(|_| wrong())?;
            Ok(Some(Quantized { values, scales }))
        };
        let mut parts = Vec::new();
        while let Some(part) = rows(&format!("part.{}", parts.len()))? {
            if part.scales.len() != header.photos {
                return Err(fault(format!(
                    "{} photos in its header, {} in its tensors",
                    header.photos,
                    part.scales.len()
                )));
            }
            parts.push(part);
        }
        let places = if old {
            None
        } else {
            let places = rows(PLACES)?;
            Some(places.ok_or_else(|| fault(format!("no \"{PLACES}\"")))?)
        };
        if places.as_ref().is_some_and(|rows| rows.scales.is_empty()) {
            return Err(fault(format!("\"{PLACES}\" is empty")));
        }
        // The older version's patch tokens have no use any more.
        let names = 2 * parts.len();
        let fits = if old {
            tensors.len() == names || tensors.len() == names + 2
        } else {
            tensors.len() == names + 2
        };
        if parts.is_empty() || !fits {
            return Err(fault(format!(
                "{} tensors, which are not those of a background",
                tensors.len()
            )));
        }
        Ok(Self {
            teacher: header.teacher,
            source: header.source,
            parts,
            places,
        })
    }
}

/// Where a fit takes its background from.
#[derive(Clone, Default)]
pub enum BackgroundSource {
    /// The one that ships with the embedded backbone, where that is the teacher; none for another teacher.
    #[default]
    Shipped,
    /// None: images are not contrasted with ordinary ones.
    None,
    /// One that was made before, by the same teacher.
    Ready(Box<Background>),
    /// Photos that the teacher looks at during the fit, and what to call them.
    Photos(Arc<dyn Dataset>, String),
}

impl From<Background> for BackgroundSource {
    fn from(background: Background) -> Self {
        Self::Ready(Box::new(background))
    }
}

/// A source of a background that fits the teacher.
pub(crate) struct Checked {
    source: BackgroundSource,
}

impl Checked {
    /// Before any work: a background of another teacher is refused.
    pub(crate) fn new(
        source: BackgroundSource,
        identity: impl Fn() -> Result<TeacherIdentity, Error>,
        tuned: bool,
        embedded: bool,
    ) -> Result<Self, Error> {
        let source = match source {
            BackgroundSource::Ready(_) if tuned => {
                return Err(Error::Config {
                    field: "background",
                    value: "a file".into(),
                    expected: "a folder of photos: the dense stage changes the teacher, which has to look at them afterwards"
                        .into(),
                });
            }
            BackgroundSource::Ready(ready) => {
                let teacher = identity()?;
                if !ready.teacher.fits(&teacher) {
                    return Err(Error::OtherTeacher {
                        background: ready.teacher.to_string(),
                        teacher: teacher.to_string(),
                    });
                }
                BackgroundSource::Ready(ready)
            }
            BackgroundSource::Shipped => match shipped() {
                Some(ready) if embedded && !tuned && ready.teacher.fits(&identity()?) => {
                    ready.into()
                }
                _ => BackgroundSource::None,
            },
            other => other,
        };
        Ok(Self { source })
    }

    /// The background, from photos by `teacher` where there is none yet.
    pub(crate) fn ready(
        self,
        teacher: &dyn Encoder,
        resize_mode: ResizeMode,
        (device, strict): (&Device, bool),
        observer: &mut dyn Observer,
    ) -> Result<Option<Background>, Error> {
        match self.source {
            BackgroundSource::Ready(ready) => Ok(Some(*ready)),
            BackgroundSource::Photos(photos, source) => {
                // Of a background that stays inside the fit nobody asks for the weights.
                let identity = TeacherIdentity::with_weights(teacher, resize_mode, String::new());
                Background::collect(
                    teacher,
                    identity,
                    &photos,
                    source,
                    (device, strict),
                    observer,
                )
                .map(Some)
            }
            BackgroundSource::Shipped | BackgroundSource::None => Ok(None),
        }
    }
}

/// The background of the embedded backbone.
#[cfg(feature = "embedded")]
fn shipped() -> Option<Background> {
    Background::from_bytes(
        defend_tiny::BACKGROUND,
        "the background of the embedded backbone",
    )
    .ok()
}

#[cfg(not(feature = "embedded"))]
fn shipped() -> Option<Background> {
    None
}

impl DefendBuilder {
    /// What ordinary photos look like to the builder's teacher, for [`DefendBuilder::background`] of later fits.
    ///
    /// # Errors
    /// [`Error::Config`] for settings that tune the teacher; as [`DefendBuilder::fit`].
    pub fn look_at_background(
        self,
        photos: impl Dataset + 'static,
        source: impl Into<String>,
        observer: &mut dyn Observer,
    ) -> Result<Background, Error> {
        let config = self.untuned(
            "a background file is for teachers that stay as they are; give a fit that tunes its teacher the photos \
             themselves",
        )?;
        let teacher = load_teacher(self.teacher, &config, &self.device)?;
        let identity = TeacherIdentity::new(teacher.encoder(), config.resize_mode)?;
        let teacher = teacher.frozen_encoder(config.compute_precision)?;
        let photos: Arc<dyn Dataset> = Arc::new(photos);
        Background::collect(
            &*teacher,
            identity,
            &photos,
            source.into(),
            (&self.device, self.strict),
            observer,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_places_is_of_the_older_format_and_loads() {
        let rows = |n: usize, d: usize| {
            Quantized::new(&Array2::from_shape_fn((n, d), |(i, j)| (1 + i + j) as f32))
        };
        let background = |places| Background {
            teacher: TeacherIdentity {
                name: "small".into(),
                weights: "0".into(),
                image_size: 32,
                resize_mode: ResizeMode::Squash,
                blocks: vec![1, 2],
            },
            source: "rows".into(),
            parts: vec![rows(4, 6), rows(4, 6), rows(4, 6)],
            places,
        };
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("b");
        for places in [None, Some(rows(7, 12))] {
            let made = background(places);
            made.save(&path).expect("a file");
            let bytes = std::fs::read(&path).expect("bytes");
            let version = if made.places.is_some() { 2 } else { 1 };
            let said = format!("\\\"format_version\\\":{version}");
            assert!(String::from_utf8_lossy(&bytes).contains(&said));
            assert_eq!(Background::load(&path).expect("a background"), made);
        }
        assert!(background(None).places().expect("places").is_none());
    }

    #[test]
    fn eight_bits_keep_a_row_within_half_a_step() {
        let rows =
            Array2::from_shape_fn((7, 33), |(i, j)| ((i * 33 + j) as f32).sin() * (i as f32));
        let restored = Quantized::new(&rows).restored();
        for (row, back) in rows.rows().into_iter().zip(restored.rows()) {
            let largest = row.iter().fold(0f32, |top, v| top.max(v.abs()));
            for (a, b) in row.iter().zip(back) {
                assert!((a - b).abs() <= largest / 254.0 + 1e-7);
            }
        }
    }
}
