//! From normal images to a detector.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use candle_core::Device;
use defend_data::{Dataset, Preprocess};
use defend_dense::{DenseObjective, DenseTuner, PrototypeObjective};
use defend_distill::{DistillRoles, Distiller, MaskPolicy};
use defend_evidence::EvidenceConfig;
use defend_metrics::FalseAlarmRate;
use defend_nn::Rng;
use defend_train::{OnStep, Training, TrainingReport};
use defend_vit::{Backbone, Encoder, ImageSource, Precision, Trainable};

use crate::background::Checked;
use crate::builder::Roles;
use crate::detector::{SCORE, StudentStage};
use crate::faults::Faulty;
use crate::input::preprocess_for;
use crate::masked::MaskedStudent;
use crate::observer::{Event, Observer, Stage};
use crate::saving::Saving;
use crate::scan::Skipped;
use crate::teacher::{Teacher, frozen, kept, load_teacher, student};
use crate::{
    DefendBuilder, DefendConfig, Detector, Error, Fitted, MapScale, MaskedConfig, NoveltyDetector,
    PatchMap, ResizedImages, Student, StudentReport, TeacherIdentity,
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

/// What the stages of a fit work with.
pub(crate) struct Stages<'a> {
    pub(crate) config: DefendConfig,
    device: Device,
    strict: bool,
    preprocess: Preprocess,
    pub(crate) images: ResizedImages,
    pub(crate) drop_suspects: usize,
    pub(crate) thumbnails: bool,
    saving: Option<Saving>,
    pub(crate) observer: &'a mut dyn Observer,
}

/// A student stage that has learnt, how that went, and the scale of its maps where that is known already.
type Learnt = (StudentStage, StudentReport, Option<MapScale>);

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
        let embedded = self.teacher.is_none();
        let teacher = load_teacher(self.teacher.take(), &self.config, &self.device)?;
        if let Student::Masked(masked) = &self.config.student {
            teacher.check_layers(masked.distill.layers)?;
        }
        let background = Checked::new(
            std::mem::take(&mut self.background),
            || TeacherIdentity::new(teacher.encoder(), self.config.resize_mode),
            self.config.dense.is_some(),
            embedded,
        )?;
        let abnormal = self.abnormal.take();
        let mut stages = self.stages(Arc::new(normal), &teacher, observer)?;
        let custom = self.roles.custom().into_iter().map(str::to_owned).collect();
        let dense = stages.tune(&teacher, self.roles.dense_objective.take())?;
        let (student, report, map_scale) = match stages.config.student.clone() {
            Student::ClosedForm(evidence) => {
                stages.closed_form_stage(teacher, background, abnormal.as_ref(), &evidence)?
            }
            Student::Masked(masked) => {
                stages.masked_stage(teacher, &masked, self.roles, self.features)?
            }
        };
        let mut detector = Detector {
            student,
            config: stages.config.clone(),
            preprocess: stages.preprocess.clone(),
            device: stages.device.clone(),
            calibration: None,
            map_scale: MapScale {
                usual: Vec::new(),
                span: 0.0,
            },
            trained_on: match stages.config.student {
                Student::ClosedForm(_) => Vec::new(),
                Student::Masked(_) => (0..stages.images.len())
                    .filter_map(|image| stages.images.hash(image))
                    .collect(),
            },
            custom_roles: custom,
        };
        detector.map_scale = match map_scale {
            Some(scale) => scale,
            None => map_scale_of(&detector, &stages.images)?,
        };
        let mut skipped = stages.images.skipped().to_vec();
        skipped.extend(finish(
            &mut detector,
            abnormal,
            stages.strict,
            stages.observer,
        )?);
        Ok(Fitted {
            detector,
            dense,
            student: report,
            images: stages.images.len(),
            skipped,
        })
    }

    /// Reads the images, and finds out where the run is saved.
    fn stages<'a>(
        &self,
        normal: Arc<dyn Dataset>,
        teacher: &Teacher,
        observer: &'a mut dyn Observer,
    ) -> Result<Stages<'a>, Error> {
        let preprocess = preprocess_for(teacher.encoder().spec(), &self.config)?;
        let images = ResizedImages::read(
            normal,
            preprocess.clone(),
            &self.device,
            self.memory,
            self.strict,
            observer,
        )?;
        let saving = self.checkpoints.clone();
        let parts = format!(
            "custom {:?}, kept features {:?}, on {:?}",
            self.roles.custom(),
            self.features.as_ref().map(|(_, precision)| precision),
            self.device.location()
        );
        let saving = saving.map(|place| Saving::new(place, &self.config, teacher, &images, &parts));
        Ok(Stages {
            config: self.config.clone(),
            device: self.device.clone(),
            strict: self.strict,
            preprocess,
            images,
            drop_suspects: self.drop_suspects,
            thumbnails: self.thumbnails,
            saving: saving.transpose()?,
            observer,
        })
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
        let checkpoints = self.saving.as_ref().map(|saving| saving.stage("dense"));
        let report = observed(self.observer, Stage::Dense, seen, |on_step| {
            let tuner = DenseTuner::new(dense.clone())?;
            let training = Training::new(&mut rng, on_step).with_checkpoints(checkpoints.as_ref());
            tuner.tune(&**teacher, &*objective, images, training)
        })
        .map_err(|error| error.naming_batch(|image| images.name(image)))?;
        Ok(Some(report))
    }

    /// The student in closed form.
    fn closed_form_stage(
        &mut self,
        teacher: Teacher,
        background: Checked,
        abnormal: Option<&Arc<dyn Dataset>>,
        evidence: &EvidenceConfig,
    ) -> Result<Learnt, Error> {
        let teacher = teacher.frozen_encoder(self.config.compute_precision)?;
        let place = (&self.device, self.strict);
        let background =
            background.ready(&*teacher, self.config.resize_mode, place, self.observer)?;
        let (preprocess, device) = (self.preprocess.clone(), self.device.clone());
        let faulty = abnormal.map(|images| Faulty {
            images,
            preprocess: &preprocess,
            device: &device,
            strict: self.strict,
        });
        let (student, report, scale) =
            self.closed_form(&teacher, background.as_ref(), evidence, faulty.as_ref())?;
        Ok((
            StudentStage::ClosedForm(Box::new(student)),
            StudentReport::ClosedForm(report),
            Some(scale),
        ))
    }

    /// The student by masked distillation.
    fn masked_stage(
        &mut self,
        teacher: Teacher,
        settings: &MaskedConfig,
        roles: Roles,
        features: Option<(PathBuf, Precision)>,
    ) -> Result<Learnt, Error> {
        let layers = settings.distill.layers;
        let teacher = teacher.frozen_backbone(self.config.compute_precision, layers)?;
        let mask: Box<dyn MaskPolicy> = match roles.mask {
            Some(mask) => mask,
            None => Box::new(settings.distill.mask),
        };
        let mut custom = Vec::new();
        if roles.objective.is_some() {
            custom.push("distance");
        }
        if roles.score.is_some() {
            custom.push(SCORE);
        }
        let objective = roles
            .objective
            .unwrap_or_else(|| Arc::new(settings.distill.distance));
        let targets = kept(&teacher, features)?;
        let (config, images, saving) = (&self.config, &self.images, &self.saving);
        let distill = |student: &dyn Trainable, observer: &mut dyn Observer| {
            let seen = settings.distill.epochs_for(images.len()) * images.len();
            let checkpoints = saving.as_ref().map(|saving| saving.stage("distill"));
            observed(observer, Stage::Distill, seen, |on_step| {
                let mut rng = Rng::stream(config.seed, stream::DISTILL);
                let roles = DistillRoles {
                    teacher: &*targets,
                    student,
                    mask: &*mask,
                    objective: &*objective,
                };
                let training =
                    Training::new(&mut rng, on_step).with_checkpoints(checkpoints.as_ref());
                Distiller::new(settings.distill.clone())?.distill(roles, images, training)
            })
            .map_err(|error| error.naming_batch(|image| images.name(image)))
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
        Ok((
            StudentStage::Masked(masked),
            StudentReport::Masked(report),
            None,
        ))
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
fn observed<R, E: Into<Error>>(
    observer: &mut dyn Observer,
    stage: Stage,
    images: usize,
    run: impl FnOnce(&mut OnStep<'_>) -> Result<R, E>,
) -> Result<R, Error> {
    observer.on(&Event::Started {
        stage,
        images: images as u64,
    });
    let mut stopped = false;
    let result = run(&mut |step| {
        observer.on(&Event::Advanced {
            images: step.images as u64,
            step: Some(step),
        });
        stopped = observer.stops();
        if stopped {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    let result = result.map_err(|error| match error.into() {
        // A checkpoint that could not be saved is told of as what it is.
        error if stopped && error.is_stop() => Error::Stopped,
        error => error,
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
