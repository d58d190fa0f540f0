//! From normal images to a detector.

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::Device;
use defend_data::Dataset;
use defend_dense::{DenseObjective, DenseReport, DenseTuner, PrototypeObjective};
use defend_distill::{DistillObjective, DistillReport, Distiller, MaskPolicy, Score};
use defend_nn::{Rng, TrainingStep};
use defend_vit::{
    Arithmetic, Backbone, BackboneSpec, CacheConfig, Cached, ImageSource, Precision, Pretrained,
    TrainScope, Trainable, Vit,
};

use crate::observer::{Event, Observer, Stage};
use crate::scan::{Skipped, preprocess_of};
use crate::{DefendConfig, Detector, Error, MapScale, NoveltyDetector, PatchMap, Pictures};

/// Entry to the library.
#[derive(Debug, Clone, Copy)]
pub struct Defend;

impl Defend {
    /// A detector with the default settings, to be changed step by step.
    pub fn builder() -> DefendBuilder {
        DefendBuilder {
            config: DefendConfig::default(),
            device: Device::Cpu,
            backbone: None,
            strict: false,
            memory: 2 << 30,
            student: None,
            dense: None,
            mask: None,
            objective: None,
            score: None,
            features: None,
        }
    }
}

/// Purposes of the independent random streams of a seed.
mod stream {
    pub(super) const DENSE: u64 = 1;
    pub(super) const STUDENT: u64 = 2;
    pub(super) const DISTILL: u64 = 3;
}

enum Source {
    Pretrained(Pretrained),
    Vit(Box<Vit>),
    Own(Arc<dyn Backbone>),
}

/// The teacher before the dense stage.
enum Teacher {
    Vit(Box<Vit>),
    Own(Arc<dyn Backbone>),
}

impl Teacher {
    fn role(&self) -> &dyn Backbone {
        match self {
            Self::Vit(vit) => &**vit,
            Self::Own(own) => &**own,
        }
    }

    /// Whether its features can hold the layers that are compared.
    fn check_layers(&self, layers: usize) -> Result<(), Error> {
        let available = match self {
            Self::Vit(vit) => vit.spec().architecture.depth,
            Self::Own(own) => own.spec().layers,
        };
        if layers <= available {
            return Ok(());
        }
        Err(Error::Config {
            field: "distill.layers",
            value: layers.to_string(),
            expected: format!("at most the {available} layers of the teacher"),
        })
    }
}

/// Settings and roles of a fit. Every role has the method's implementation as its default and can be
/// replaced by the user's own.
pub struct DefendBuilder {
    config: DefendConfig,
    device: Device,
    backbone: Option<Source>,
    strict: bool,
    memory: usize,
    student: Option<Arc<dyn Trainable>>,
    dense: Option<Box<dyn DenseObjective>>,
    mask: Option<Box<dyn MaskPolicy>>,
    objective: Option<Arc<dyn DistillObjective>>,
    score: Option<Arc<dyn Score>>,
    features: Option<(PathBuf, Precision)>,
}

/// A fitted detector and how the fit went.
pub struct Fitted {
    /// The detector, not calibrated yet.
    pub detector: Detector,
    /// The dense stage, where it ran.
    pub dense: Option<DenseReport>,
    /// The distillation.
    pub distill: DistillReport,
    /// Images that were used.
    pub images: usize,
    /// Images that could not be read.
    pub skipped: Vec<Skipped>,
}

impl DefendBuilder {
    /// Where the teacher's weights come from. Without it, the embedded backbone is used.
    #[must_use]
    pub fn backbone(mut self, source: Pretrained) -> Self {
        self.backbone = Some(Source::Pretrained(source));
        self
    }

    /// A teacher that is loaded already. It computes in its own type where neither the dense stage tunes it nor
    /// [`DefendConfig::arithmetic`] is `bf16`.
    #[must_use]
    pub fn teacher(mut self, teacher: Vit) -> Self {
        self.backbone = Some(Source::Vit(Box::new(teacher)));
        self
    }

    /// A teacher of one's own. It stays as it is, so [`DefendConfig::dense`] has to be `None`, and without
    /// [`Backbone::tensors`] such a detector cannot be saved.
    #[must_use]
    pub fn own_teacher(mut self, teacher: Arc<dyn Backbone>) -> Self {
        self.backbone = Some(Source::Own(teacher));
        self
    }

    /// A student of one's own in place of a random copy of the teacher's architecture; it is trained in
    /// place. Its features have the teacher's width and grid.
    #[must_use]
    pub fn own_student(mut self, student: Arc<dyn Trainable>) -> Self {
        self.student = Some(student);
        self
    }

    /// All settings at once.
    #[must_use]
    pub fn config(mut self, config: DefendConfig) -> Self {
        self.config = config;
        self
    }

    /// Seed of every random choice.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.config.seed = seed;
        self
    }

    /// Where to compute; the CPU by default.
    #[must_use]
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Whether the first unreadable image ends the fit, instead of being skipped and counted.
    #[must_use]
    pub fn strict(mut self, strict: bool) -> Self {
        self.strict = strict;
        self
    }

    /// Limit of the memory for resized pictures, bytes; 2 GiB by default, enough for 14,000.
    #[must_use]
    pub fn picture_memory(mut self, bytes: usize) -> Self {
        self.memory = bytes;
        self
    }

    /// Another objective for the dense stage.
    #[must_use]
    pub fn dense_objective(mut self, objective: Box<dyn DenseObjective>) -> Self {
        self.dense = Some(objective);
        self
    }

    /// Another choice of the patches that the student sees.
    #[must_use]
    pub fn mask(mut self, mask: Box<dyn MaskPolicy>) -> Self {
        self.mask = Some(mask);
        self
    }

    /// Another distance between teacher and student; such a detector cannot be saved.
    #[must_use]
    pub fn objective(mut self, objective: Arc<dyn DistillObjective>) -> Self {
        self.objective = Some(objective);
        self
    }

    /// Another step from patch distances to a score; such a detector cannot be saved.
    #[must_use]
    pub fn score(mut self, score: Arc<dyn Score>) -> Self {
        self.score = Some(score);
        self
    }

    /// Keeps the teacher's features of the training images in a folder, so that another fit on the same pictures, weights
    /// and size does not compute them again: 150 KB an image for ViT-Ti, half of it with [`Precision::Half`]. The teacher
    /// of the dense stage is another one in each fit, so this pays without it.
    #[must_use]
    pub fn feature_folder(mut self, folder: impl Into<PathBuf>, precision: Precision) -> Self {
        self.features = Some((folder.into(), precision));
        self
    }

    /// Runs all stages on normal images.
    ///
    /// # Errors
    /// [`Error::Config`] before any work, [`Error::NoImages`], [`Error::Unreadable`] when strict, and what
    /// the stages return.
    pub fn fit(
        self,
        normal: impl Dataset + 'static,
        observer: &mut dyn Observer,
    ) -> Result<Fitted, Error> {
        self.config.validate()?;
        let (config, device) = (self.config, self.device);
        let teacher = load_teacher(self.backbone, &config, &device)?;
        teacher.check_layers(config.distill.layers)?;
        let preprocess = preprocess_of(teacher.role().spec(), config.fit);
        let pictures = Pictures::read(
            Arc::new(normal),
            preprocess.clone(),
            &device,
            self.memory,
            self.strict,
            observer,
        )?;

        let mut dense_report = None;
        if let (Some(dense), Teacher::Vit(teacher)) = (&config.dense, &teacher) {
            let mut rng = Rng::stream(config.seed, stream::DENSE);
            let width = teacher.spec().architecture.width;
            let objective: Box<dyn DenseObjective> = match self.dense {
                Some(objective) => objective,
                None => Box::new(PrototypeObjective::random(dense, width, &mut rng, &device)?),
            };
            let images = dense.epochs * pictures.len();
            let report = observed(observer, Stage::Dense, images, |on_step| {
                let tuner = DenseTuner::new(dense.clone())?;
                tuner.tune(&**teacher, &*objective, &pictures, &mut rng, on_step)
            })?;
            dense_report = Some(report);
        }
        let teacher: Arc<dyn Backbone> = match teacher {
            Teacher::Vit(vit) => {
                let frozen = frozen(&vit, config.arithmetic)?;
                Arc::new(frozen.with_layers(config.distill.layers)?)
            }
            Teacher::Own(own) => own,
        };

        let mask: Box<dyn MaskPolicy> = match self.mask {
            Some(mask) => mask,
            None => Box::new(config.distill.mask),
        };
        let custom = match (&self.objective, &self.score) {
            (Some(_), _) => Some("distance"),
            (_, Some(_)) => Some("score"),
            _ => None,
        };
        let objective = self
            .objective
            .unwrap_or_else(|| Arc::new(config.distill.distance));
        let targets = kept(&teacher, self.features)?;
        let distill = |student: &dyn Trainable, observer: &mut dyn Observer| {
            let images = config.distill.epochs_for(pictures.len()) * pictures.len();
            observed(observer, Stage::Distill, images, |on_step| {
                let mut rng = Rng::stream(config.seed, stream::DISTILL);
                Distiller::new(config.distill.clone())?.distill(
                    &*targets,
                    student,
                    &*mask,
                    &*objective,
                    &pictures,
                    &mut rng,
                    on_step,
                )
            })
        };
        let (student, distill): (Arc<dyn Backbone>, _) = if let Some(own) = self.student {
            let report = distill(&*own, observer)?;
            (own, report)
        } else {
            let vit = student(teacher.spec(), &config, &device)?;
            let report = distill(&vit, observer)?;
            (Arc::new(frozen(&vit, config.arithmetic)?), report)
        };
        let mut detector = Detector {
            teacher,
            student,
            objective,
            score: self.score.unwrap_or_else(|| Arc::new(config.aggregation)),
            custom,
            config,
            preprocess,
            device,
            calibration: None,
            map_scale: MapScale {
                usual: Vec::new(),
                span: 0.0,
            },
        };
        detector.map_scale = map_scale(&detector, &pictures)?;
        Ok(Fitted {
            images: pictures.len(),
            skipped: pictures.skipped().to_vec(),
            detector,
            dense: dense_report,
            distill,
        })
    }
}

/// A random student for a teacher.
fn student(teacher: &BackboneSpec, config: &DefendConfig, device: &Device) -> Result<Vit, Error> {
    let mut rng = Rng::stream(config.seed, stream::STUDENT);
    let drop_path = config.distill.drop_path;
    Ok(Vit::random(teacher.clone(), drop_path, &mut rng, device)?)
}

/// A copy of a network that trains no more.
fn frozen(vit: &Vit, arithmetic: Arithmetic) -> Result<Vit, Error> {
    Ok(match arithmetic {
        // As it is: a frozen teacher may compute in another type already.
        Arithmetic::F32 => vit.copy(TrainScope::Frozen)?,
        Arithmetic::Bf16 => vit.with_arithmetic(arithmetic)?,
    })
}

/// The teacher, with its features kept in a folder if asked for.
fn kept(
    teacher: &Arc<dyn Backbone>,
    features: Option<(PathBuf, Precision)>,
) -> Result<Arc<dyn Backbone>, Error> {
    let Some((folder, precision)) = features else {
        return Ok(Arc::clone(teacher));
    };
    let cache = CacheConfig {
        // The distiller keeps them in memory itself.
        memory_bytes: 0,
        folder: Some(folder),
        precision,
    };
    Ok(Arc::new(Cached::new(Arc::clone(teacher), cache)?))
}

/// The teacher as it enters the dense stage, with the blocks trainable that this stage trains.
fn load_teacher(
    source: Option<Source>,
    config: &DefendConfig,
    device: &Device,
) -> Result<Teacher, Error> {
    let dense_blocks = config.dense.as_ref().map(|d| d.trained_blocks);
    let scope = dense_blocks.map_or(TrainScope::Frozen, TrainScope::LastBlocks);
    let vit = match source {
        Some(Source::Own(_)) if config.dense.is_some() => {
            return Err(Error::Config {
                field: "dense",
                value: "set".into(),
                expected: "null with a teacher of one's own, which cannot be fine-tuned".into(),
            });
        }
        Some(Source::Own(_)) if config.image_size.is_some() => {
            return Err(Error::Config {
                field: "image_size",
                value: "set".into(),
                expected: "null with a teacher of one's own, whose spec says its size".into(),
            });
        }
        Some(Source::Own(own)) => return Ok(Teacher::Own(own)),
        Some(Source::Vit(vit)) => vit.copy_to(scope, device)?,
        Some(Source::Pretrained(source)) => source.load(scope, device)?,
        #[cfg(feature = "embedded")]
        None => crate::embedded_backbone().load(scope, device)?,
        #[cfg(not(feature = "embedded"))]
        None => {
            return Err(Error::Config {
                field: "backbone",
                value: "not set".into(),
                expected: "a pretrained backbone, or the feature \"embedded\"".into(),
            });
        }
    };
    let vit = match config.image_size {
        Some(size) => vit.resized(size, scope)?,
        None => vit,
    };
    Ok(Teacher::Vit(Box::new(vit)))
}

/// Runs a training stage between its events.
fn observed<R, E>(
    observer: &mut dyn Observer,
    stage: Stage,
    images: usize,
    run: impl FnOnce(&mut dyn FnMut(TrainingStep)) -> Result<R, E>,
) -> Result<R, E> {
    observer.on(&Event::Started {
        stage,
        images: images as u64,
    });
    let result = run(&mut |step| {
        observer.on(&Event::Advanced {
            images: step.images as u64,
            loss: Some(step.loss),
        });
    })?;
    observer.on(&Event::Finished { stage });
    Ok(result)
}

/// Usual patch values and their spread, from some training images.
fn map_scale(detector: &Detector, pictures: &Pictures) -> Result<MapScale, Error> {
    const IMAGES: usize = 128;
    let indices: Vec<usize> = (0..pictures.len().min(IMAGES)).collect();
    let mut maps = Vec::new();
    for batch in indices.chunks(detector.batch()) {
        for novelty in detector.score(&pictures.images(batch)?)? {
            maps.extend(novelty.map);
        }
    }
    let maps: Vec<&PatchMap> = maps.iter().collect();
    // The training images are what is usual: new ones may lie twice as far above it before the colour is full.
    Ok(MapScale::of(&maps, 2.0))
}
