//! From normal images to a detector.

use std::sync::Arc;

use candle_core::Device;
use defend_data::Dataset;
use defend_dense::{DenseObjective, DenseTuner, PrototypeObjective};
use defend_distill::{DistillRoles, Distiller, MaskPolicy};
use defend_evidence::Summary;
use defend_metrics::FalseAlarmRate;
use defend_nn::Rng;
use defend_train::{Training, TrainingReport, TrainingStep};
use defend_vit::{Backbone, Encoder, ImageSource, Trainable};

use crate::background::Checked;
use crate::detector::StudentStage;
use crate::faults::Faulty;
use crate::masked::MaskedStudent;
use crate::observer::{Event, Observer, Stage};
use crate::scan::{Skipped, preprocess_for};
use crate::teacher::{Teacher, frozen, kept, load_teacher, student};
use crate::{
    BackgroundSource, DefendBuilder, DefendConfig, Detector, Error, MapScale, MaskedConfig,
    NoveltyDetector, PatchMap, ResizedImages, Student, TeacherIdentity,
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
    pub dense: Option<TrainingReport>,
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
    Masked(TrainingReport),
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
    pub fn distill(&self) -> Option<&TrainingReport> {
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

/// What both student stages work with.
pub(crate) struct Stages<'a> {
    pub(crate) config: DefendConfig,
    device: Device,
    pub(crate) images: ResizedImages,
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
            || TeacherIdentity::new(teacher.encoder(), config.resize_mode),
            config.dense.is_some(),
            embedded,
        )?;
        let preprocess = preprocess_for(teacher.encoder().spec(), &config)?;
        let images = ResizedImages::read(
            Arc::new(normal),
            preprocess.clone(),
            &device,
            self.memory,
            strict,
            observer,
        )?;
        let (count, mut skipped) = (images.len(), images.skipped().to_vec());
        let mut stages = Stages {
            config: config.clone(),
            device: device.clone(),
            images,
            drop_suspects: self.drop_suspects,
            observer,
        };
        let dense = stages.tune(&teacher, self.dense.take())?;
        let (student, report, map_scale) = match &config.student {
            Student::ClosedForm(evidence) => {
                let teacher = teacher.frozen_encoder(config.compute_precision)?;
                let background = background.ready(
                    &*teacher,
                    config.resize_mode,
                    (&device, strict),
                    stages.observer,
                )?;
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
                let teacher =
                    teacher.frozen_backbone(config.compute_precision, masked.distill.layers)?;
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
            None => map_scale_of(&detector, &stages.images)?,
        };
        skipped.extend(finish(&mut detector, abnormal, strict, stages.observer)?);
        Ok(Fitted {
            detector,
            dense,
            student: report,
            images: count,
            skipped,
        })
    }

    /// Checked settings without a dense stage.
    pub(crate) fn untuned(&self, expected: &str) -> Result<DefendConfig, Error> {
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
                expected: "null: backgrounds and tables of features are of whole images".into(),
            });
        }
        Ok(self.config.clone())
    }

    /// Refuses roles that the settings have no use for.
    pub(crate) fn check_roles(&self) -> Result<(), Error> {
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
    ) -> Result<Option<TrainingReport>, Error> {
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
        let (seen, images) = (dense.epochs * self.images.len(), &self.images);
        let report = observed(self.observer, Stage::Dense, seen, |on_step| {
            let tuner = DenseTuner::new(dense.clone())?;
            let training = Training::new(&mut rng, on_step);
            tuner.tune(&**teacher, &*objective, images, training)
        })?;
        Ok(Some(report))
    }

    fn masked(
        &mut self,
        teacher: Arc<dyn Backbone>,
        settings: &MaskedConfig,
        roles: DefendBuilder,
    ) -> Result<(MaskedStudent, TrainingReport), Error> {
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
        let (config, images) = (&self.config, &self.images);
        let distill = |student: &dyn Trainable, observer: &mut dyn Observer| {
            let seen = settings.distill.epochs_for(images.len()) * images.len();
            observed(observer, Stage::Distill, seen, |on_step| {
                let mut rng = Rng::stream(config.seed, stream::DISTILL);
                let roles = DistillRoles {
                    teacher: &*targets,
                    student,
                    mask: &*mask,
                    objective: &*objective,
                };
                let training = Training::new(&mut rng, on_step);
                Distiller::new(settings.distill.clone())?.distill(roles, images, training)
            })
        };
        let (student, report): (Arc<dyn Backbone>, _) = if let Some(own) = roles.student {
            let report = distill(&*own, self.observer)?;
            (own, report)
        } else {
            let vit = student(teacher.spec(), config.seed, settings, &self.device)?;
            let report = distill(&vit, self.observer)?;
            (Arc::new(frozen(&vit, config.compute_precision)?), report)
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
pub(crate) fn finish(
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
fn map_scale_of(detector: &Detector, images: &ResizedImages) -> Result<MapScale, Error> {
    const IMAGES: usize = 128;
    let indices: Vec<usize> = (0..images.len().min(IMAGES)).collect();
    let mut maps = Vec::new();
    for batch in indices.chunks(detector.batch_size()) {
        for novelty in detector.score(&images.images(batch)?)? {
            maps.extend(novelty.map);
        }
    }
    let maps: Vec<&PatchMap> = maps.iter().collect();
    // The training images are what is usual: new ones may lie twice as far above it before the colour is full.
    Ok(MapScale::from_maps(&maps, 2.0))
}
