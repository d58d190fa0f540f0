//! From normal images to a detector.

use std::sync::Arc;

use candle_core::Device;
use defend_data::Dataset;
use defend_dense::{DenseObjective, DenseReport, DenseTuner, PrototypeObjective};
use defend_distill::{DistillReport, Distiller, MaskPolicy};
use defend_evidence::Summary;
use defend_metrics::FalseAlarmRate;
use defend_nn::{Rng, TrainingStep};
use defend_vit::{
    Arithmetic, Backbone, BackboneSpec, CacheConfig, Cached, Encoder, ImageSource, TrainScope,
    Trainable, Vit,
};

use crate::background::Checked;
use crate::builder::Source;
use crate::closed_fit::Fit;
use crate::detector::StudentStage;
use crate::faults::Faulty;
use crate::masked::MaskedStudent;
use crate::observer::{Event, Observer, Stage};
use crate::scan::{Skipped, preprocess_for};
use crate::tokens::TokenBlocks;
use crate::{
    Background, BackgroundSource, DefendBuilder, DefendConfig, Detector, Error, FeatureTable,
    MapScale, MaskedConfig, NoveltyDetector, PatchMap, Pictures, Student, TeacherIdentity,
};

/// Images a pass of the teacher over the normal images and the background.
pub(crate) const PASS_BATCH: usize = 32;

/// Purposes of the independent random streams of a seed.
pub(crate) mod stream {
    pub(crate) const DENSE: u64 = 1;
    pub(crate) const STUDENT: u64 = 2;
    pub(crate) const DISTILL: u64 = 3;
    pub(crate) const PATCHES: u64 = 5;
    pub(crate) const PLACES: u64 = 6;
}

/// A fitted detector and how the fit went.
pub struct Fitted {
    /// The detector. In closed form it has a threshold already, where there are enough images for one.
    pub detector: Detector,
    /// The dense stage, where it ran.
    pub dense: Option<DenseReport>,
    /// The student stage.
    pub student: StudentReport,
    /// Images that were used.
    pub images: usize,
    /// Images that could not be read.
    pub skipped: Vec<Skipped>,
}

/// How the student stage went.
#[derive(Debug, Clone, PartialEq)]
pub enum StudentReport {
    /// In closed form.
    ClosedForm(ClosedFormReport),
    /// By masked distillation.
    Masked(DistillReport),
}

/// What the closed form found in the normal images.
#[derive(Debug, Clone, PartialEq)]
pub struct ClosedFormReport {
    /// Images, groups of near copies, and what the weights come from.
    pub summary: Summary,
    /// Weight of the contrast with ordinary photos, 0 where it is off.
    pub contrast_weight: f64,
    /// Weight of the patches, 0 where normal images are too various for them.
    pub patch_weight: f64,
    /// Where the ordinary photos are from; `None` without any: the contrast is off, and a background would switch it on.
    pub background: Option<String>,
    /// Images that were left out as suspects.
    pub dropped: Vec<String>,
}

impl Fitted {
    /// The distillation of a masked student.
    pub fn distill(&self) -> Option<&DistillReport> {
        match &self.student {
            StudentReport::Masked(report) => Some(report),
            StudentReport::ClosedForm(_) => None,
        }
    }

    /// What the closed form found.
    pub fn closed_form(&self) -> Option<&ClosedFormReport> {
        match &self.student {
            StudentReport::ClosedForm(report) => Some(report),
            StudentReport::Masked(_) => None,
        }
    }
}

/// The teacher before the dense stage.
enum Teacher {
    Vit(Box<Vit>),
    Own(Arc<dyn Backbone>),
    Encoder(Arc<dyn Encoder>),
}

impl Teacher {
    fn encoder(&self) -> &dyn Encoder {
        match self {
            Self::Vit(vit) => &**vit,
            Self::Own(own) => &**own,
            Self::Encoder(own) => &**own,
        }
    }

    /// Whether its features can hold the layers that are compared.
    fn check_layers(&self, layers: usize) -> Result<(), Error> {
        let available = match self {
            Self::Vit(vit) => vit.spec().architecture.depth,
            Self::Own(own) => own.spec().layers,
            Self::Encoder(_) => return Err(needs_backbone()),
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

    /// Frozen, for the closed form.
    fn frozen_encoder(self, arithmetic: Arithmetic) -> Result<Arc<dyn Encoder>, Error> {
        Ok(match self {
            Self::Vit(vit) => Arc::new(frozen(&vit, arithmetic)?),
            Self::Own(own) => own,
            Self::Encoder(own) => own,
        })
    }

    /// Frozen, with the layers that a masked student is compared at.
    fn frozen_backbone(
        self,
        arithmetic: Arithmetic,
        layers: usize,
    ) -> Result<Arc<dyn Backbone>, Error> {
        match self {
            Self::Vit(vit) => Ok(Arc::new(frozen(&vit, arithmetic)?.with_layers(layers)?)),
            Self::Own(own) => Ok(own),
            Self::Encoder(_) => Err(needs_backbone()),
        }
    }
}

/// A masked student was asked for with an encoder.
fn needs_backbone() -> Error {
    Error::Config {
        field: "student",
        value: "masked".into(),
        expected: "closed-form for an encoder, which has no CLS attention and no layers to compare"
            .into(),
    }
}

/// What both student stages work with.
pub(crate) struct Stages<'a> {
    pub(crate) config: DefendConfig,
    device: Device,
    pub(crate) pictures: Pictures,
    pub(crate) drop_suspects: usize,
    pub(crate) observer: &'a mut dyn Observer,
}

impl DefendBuilder {
    /// Runs all stages on normal images.
    ///
    /// # Errors
    /// [`Error::Config`] before any work, [`Error::OtherTeacher`] for a background that another teacher made,
    /// [`Error::NoImages`], [`Error::Unreadable`] when strict, and what the stages return.
    pub fn fit(
        mut self,
        normal: impl Dataset + 'static,
        observer: &mut dyn Observer,
    ) -> Result<Fitted, Error> {
        self.config.validate()?;
        self.check_roles()?;
        let (config, device, strict) = (self.config.clone(), self.device.clone(), self.strict);
        let (embedded, abnormal) = (self.backbone.is_none(), self.abnormal.take());
        let teacher = load_teacher(self.backbone.take(), &config, &device)?;
        if let Student::Masked(masked) = &config.student {
            teacher.check_layers(masked.distill.layers)?;
        }
        let background = Checked::new(
            std::mem::take(&mut self.background),
            || TeacherIdentity::of(teacher.encoder(), config.fit),
            config.dense.is_some(),
            embedded,
        )?;
        let preprocess = preprocess_for(teacher.encoder().spec(), &config);
        let pictures = Pictures::read(
            Arc::new(normal),
            preprocess.clone(),
            &device,
            self.memory,
            strict,
            observer,
        )?;
        let (images, mut skipped) = (pictures.len(), pictures.skipped().to_vec());
        let mut stages = Stages {
            config: config.clone(),
            device: device.clone(),
            pictures,
            drop_suspects: self.drop_suspects,
            observer,
        };
        let dense = stages.tune(&teacher, self.dense.take())?;
        let (student, report, map_scale) = match &config.student {
            Student::ClosedForm(evidence) => {
                let teacher = teacher.frozen_encoder(config.arithmetic)?;
                let background =
                    background.ready(&*teacher, config.fit, (&device, strict), stages.observer)?;
                let faulty = abnormal.as_ref().map(|images| Faulty {
                    images,
                    preprocess: &preprocess,
                    device: &device,
                    strict,
                });
                let (student, report, scale) =
                    stages.closed_form(&teacher, background.as_ref(), evidence, faulty.as_ref())?;
                (
                    StudentStage::ClosedForm(Box::new(student)),
                    StudentReport::ClosedForm(report),
                    Some(scale),
                )
            }
            Student::Masked(masked) => {
                let teacher = teacher.frozen_backbone(config.arithmetic, masked.distill.layers)?;
                let (student, report) = stages.masked(teacher, masked, self)?;
                (
                    StudentStage::Masked(student),
                    StudentReport::Masked(report),
                    None,
                )
            }
        };
        let mut detector = Detector {
            student,
            config,
            preprocess,
            device,
            calibration: None,
            map_scale: MapScale {
                usual: Vec::new(),
                span: 0.0,
            },
        };
        detector.map_scale = match map_scale {
            Some(scale) => scale,
            None => map_scale_of(&detector, &stages.pictures)?,
        };
        skipped.extend(finish(&mut detector, abnormal, strict, stages.observer)?);
        Ok(Fitted {
            detector,
            dense,
            student: report,
            images,
            skipped,
        })
    }

    /// What the builder's teacher says of some pictures, for tools of one's own and for [`DefendBuilder::fit_features`].
    ///
    /// # Errors
    /// [`Error::Config`] for settings that tune the teacher; as [`DefendBuilder::fit`].
    pub fn embed(
        self,
        images: impl Dataset + 'static,
        observer: &mut dyn Observer,
    ) -> Result<(FeatureTable, Vec<Skipped>), Error> {
        let config = self.untuned("features are those of a teacher that stays as it is")?;
        let teacher = load_teacher(self.backbone, &config, &self.device)?;
        let identity = TeacherIdentity::of(teacher.encoder(), config.fit)?;
        let teacher = teacher.frozen_encoder(config.arithmetic)?;
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
                expected: "closed-form: a masked student learns from the pictures".into(),
            });
        };
        let (device, strict) = (self.device.clone(), self.strict);
        let (embedded, abnormal) = (self.backbone.is_none(), self.abnormal.take());
        let teacher = load_teacher(self.backbone.take(), &config, &device)?;
        let identity = TeacherIdentity::of(teacher.encoder(), config.fit)?;
        table.check(&identity, teacher.encoder().spec().architecture.width)?;
        let background = Checked::new(
            std::mem::take(&mut self.background),
            || Ok(identity.clone()),
            false,
            embedded,
        )?;
        let preprocess = preprocess_for(teacher.encoder().spec(), &config);
        let teacher = teacher.frozen_encoder(config.arithmetic)?;
        let background = background.ready(&*teacher, config.fit, (&device, strict), observer)?;
        let names = |image: usize| table.names().get(image).cloned().unwrap_or_default();
        let fit = Fit {
            images: table.embeddings(),
            names: &names,
            background: background.as_ref(),
            normals: None,
            faulty: None,
            config: evidence,
            seed: config.seed,
            drop_suspects: self.drop_suspects,
        };
        let blocks = TokenBlocks::of(teacher.spec().architecture.depth);
        let (student, report, map_scale) = fit.learn(teacher, blocks, observer)?;
        let mut detector = Detector {
            student: StudentStage::ClosedForm(Box::new(student)),
            config,
            preprocess,
            device,
            calibration: None,
            map_scale,
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

    /// Checked settings without a dense stage.
    fn untuned(&self, expected: &str) -> Result<DefendConfig, Error> {
        self.config.validate()?;
        if self.config.dense.is_some() {
            return Err(Error::Config {
                field: "dense",
                value: "set".into(),
                expected: format!("null: {expected}"),
            });
        }
        let of_parts = [
            ("region", self.config.region.is_some()),
            ("tiles", self.config.tiles.is_some()),
        ];
        if let Some((field, _)) = of_parts.into_iter().find(|(_, given)| *given) {
            return Err(Error::Config {
                field,
                value: "set".into(),
                expected: "null: backgrounds and tables of features are of whole pictures".into(),
            });
        }
        Ok(self.config.clone())
    }

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
        let teacher = load_teacher(self.backbone, &config, &self.device)?;
        let identity = TeacherIdentity::of(teacher.encoder(), config.fit)?;
        let teacher = teacher.frozen_encoder(config.arithmetic)?;
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

    /// Refuses roles that the settings have no use for.
    fn check_roles(&self) -> Result<(), Error> {
        let masked = [
            ("own_student", self.student.is_some()),
            ("mask", self.mask.is_some()),
            ("objective", self.objective.is_some()),
            ("score", self.score.is_some()),
            ("feature_folder", self.features.is_some()),
        ];
        let unused = |roles: &[(&'static str, bool)]| {
            roles
                .iter()
                .find(|(_, given)| *given)
                .map(|(role, _)| *role)
        };
        let (field, expected) = match &self.config.student {
            Student::ClosedForm(_) => (unused(&masked), "a masked student, which it is a role of"),
            Student::Masked(_) => {
                let given = matches!(
                    self.background,
                    BackgroundSource::Ready(_) | BackgroundSource::Photos(..)
                );
                let closed = [
                    ("background", given),
                    ("abnormal", self.abnormal.is_some()),
                    ("drop_suspects", self.drop_suspects > 0),
                ];
                (unused(&closed), "the closed form, which works with it")
            }
        };
        let (field, expected) = match field {
            None if self.dense.is_some() && self.config.dense.is_none() => {
                (Some("dense_objective"), "settings with a dense stage")
            }
            _ => (field, expected),
        };
        match field {
            None => Ok(()),
            Some(field) => Err(Error::Config {
                field,
                value: "set".into(),
                expected: expected.into(),
            }),
        }
    }
}

impl Stages<'_> {
    fn tune(
        &mut self,
        teacher: &Teacher,
        objective: Option<Box<dyn DenseObjective>>,
    ) -> Result<Option<DenseReport>, Error> {
        let (Some(dense), Teacher::Vit(teacher)) = (&self.config.dense, teacher) else {
            return Ok(None);
        };
        let mut rng = Rng::stream(self.config.seed, stream::DENSE);
        let width = teacher.spec().architecture.width;
        let objective: Box<dyn DenseObjective> = match objective {
            Some(objective) => objective,
            None => Box::new(PrototypeObjective::random(
                dense,
                width,
                &mut rng,
                &self.device,
            )?),
        };
        let (images, pictures) = (dense.epochs * self.pictures.len(), &self.pictures);
        let report = observed(self.observer, Stage::Dense, images, |on_step| {
            let tuner = DenseTuner::new(dense.clone())?;
            tuner.tune(&**teacher, &*objective, pictures, &mut rng, on_step)
        })?;
        Ok(Some(report))
    }

    fn masked(
        &mut self,
        teacher: Arc<dyn Backbone>,
        settings: &MaskedConfig,
        roles: DefendBuilder,
    ) -> Result<(MaskedStudent, DistillReport), Error> {
        let mask: Box<dyn MaskPolicy> = match roles.mask {
            Some(mask) => mask,
            None => Box::new(settings.distill.mask),
        };
        let custom = match (&roles.objective, &roles.score) {
            (Some(_), _) => Some("distance"),
            (_, Some(_)) => Some("score"),
            _ => None,
        };
        let objective = roles
            .objective
            .unwrap_or_else(|| Arc::new(settings.distill.distance));
        let targets = kept(&teacher, roles.features)?;
        let (config, pictures) = (&self.config, &self.pictures);
        let distill = |student: &dyn Trainable, observer: &mut dyn Observer| {
            let images = settings.distill.epochs_for(pictures.len()) * pictures.len();
            observed(observer, Stage::Distill, images, |on_step| {
                let mut rng = Rng::stream(config.seed, stream::DISTILL);
                Distiller::new(settings.distill.clone())?.distill(
                    &*targets,
                    student,
                    &*mask,
                    &*objective,
                    pictures,
                    &mut rng,
                    on_step,
                )
            })
        };
        let (student, report): (Arc<dyn Backbone>, _) = if let Some(own) = roles.student {
            let report = distill(&*own, self.observer)?;
            (own, report)
        } else {
            let vit = student(teacher.spec(), config.seed, settings, &self.device)?;
            let report = distill(&vit, self.observer)?;
            (Arc::new(frozen(&vit, config.arithmetic)?), report)
        };
        let mut masked = MaskedStudent::new(teacher, student, settings);
        masked.objective = objective;
        masked.custom = custom;
        if let Some(score) = roles.score {
            masked.score = score;
        }
        Ok((masked, report))
    }
}

/// The threshold that a closed form has from its fit, where there are enough images for the rate, and the abnormal images that it
/// knows; those that could not be read.
fn finish(
    detector: &mut Detector,
    abnormal: Option<Arc<dyn Dataset>>,
    strict: bool,
    observer: &mut dyn Observer,
) -> Result<Vec<Skipped>, Error> {
    if detector.evidence().is_some() {
        let rate = FalseAlarmRate::new(detector.config.false_alarm_rate)?;
        // Too few images for the rate leave it without a threshold, which the caller sees.
        detector.calibrate_if_enough(rate)?;
    }
    Ok(match abnormal {
        Some(abnormal) => {
            detector
                .learn_abnormal_of(&abnormal, strict, observer)?
                .skipped
        }
        None => Vec::new(),
    })
}

/// A random student for a teacher.
fn student(
    teacher: &BackboneSpec,
    seed: u64,
    settings: &MaskedConfig,
    device: &Device,
) -> Result<Vit, Error> {
    let mut rng = Rng::stream(seed, stream::STUDENT);
    let drop_path = settings.distill.drop_path;
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
    features: Option<(std::path::PathBuf, defend_vit::Precision)>,
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
        Some(Source::Own(_) | Source::Encoder(_)) if config.dense.is_some() => {
            return Err(Error::Config {
                field: "dense",
                value: "set".into(),
                expected: "null with a teacher of one's own, which cannot be fine-tuned".into(),
            });
        }
        Some(Source::Own(_) | Source::Encoder(_)) if config.image_size.is_some() => {
            return Err(Error::Config {
                field: "image_size",
                value: "set".into(),
                expected: "null with a teacher of one's own, whose spec says its size".into(),
            });
        }
        Some(Source::Own(own)) => return Ok(Teacher::Own(own)),
        Some(Source::Encoder(own)) => return Ok(Teacher::Encoder(own)),
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
fn map_scale_of(detector: &Detector, pictures: &Pictures) -> Result<MapScale, Error> {
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
