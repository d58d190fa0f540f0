//! Learning from known abnormal images.

use std::sync::Arc;

use defend_data::Dataset;
use defend_evidence::Embeddings;
use defend_metrics::FalseAlarmRate;
use defend_vit::ImageSource;

use crate::detector::StudentStage;
use crate::normals::Normals;
use crate::observer::{Observer, Stage};
use crate::{CalibrationSource, Detector, Error, Pictures, Skipped};

/// Limit of the memory for resized pictures: they are looked at once.
const PICTURE_BYTES: usize = 64 << 20;

/// What became of a detector that has learnt more images.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Learnt {
    /// Images that were learnt.
    pub images: usize,
    /// Images that could not be read.
    pub skipped: Vec<Skipped>,
    /// Whether a threshold from held-out images was dropped, since scores have changed: calibrate again. A threshold from
    /// left-out values is chosen anew by itself.
    pub calibration_dropped: bool,
}

impl Detector {
    /// Learns what some abnormal images look like, beside those that it knows already: images like them score higher, and none
    /// scores lower. The strongest lever there is: one helps, twenty help a lot, also a little against kinds that were never
    /// shown (docs/RESULTS.md).
    ///
    /// A failure leaves the detector as it was.
    ///
    /// # Errors
    /// [`Error::Config`] for a masked student; [`Error::AlsoNormal`] for an image that is one of the normal ones;
    /// [`Error::NoImages`] when nothing is readable.
    pub fn learn_abnormal(
        &mut self,
        abnormal: impl Dataset + 'static,
        observer: &mut dyn Observer,
    ) -> Result<Learnt, Error> {
        self.learn_abnormal_of(&(Arc::new(abnormal) as Arc<dyn Dataset>), false, observer)
    }

    pub(crate) fn learn_abnormal_of(
        &mut self,
        abnormal: &Arc<dyn Dataset>,
        strict: bool,
        observer: &mut dyn Observer,
    ) -> Result<Learnt, Error> {
        let (embeddings, pictures) = self.embed(abnormal, strict, observer)?;
        let StudentStage::ClosedForm(closed) = &mut self.student else {
            return Err(needs_closed_form());
        };
        closed
            .evidence
            .learn_abnormal(&embeddings)
            .map_err(|error| match error {
                defend_evidence::Error::AlsoNormal { image } => Error::AlsoNormal {
                    name: pictures.name(image),
                },
                other => other.into(),
            })?;
        Ok(Learnt {
            images: pictures.len(),
            skipped: pictures.skipped().to_vec(),
            calibration_dropped: self.recalibrate()?,
        })
    }

    /// The teacher's embeddings of a data set, in its order without the unreadable images.
    ///
    /// # Errors
    /// [`Error::Config`] for a masked student; as [`Pictures::read`]; [`Error::NonFiniteFeatures`].
    pub(crate) fn embed(
        &self,
        images: &Arc<dyn Dataset>,
        strict: bool,
        observer: &mut dyn Observer,
    ) -> Result<(Embeddings, Pictures), Error> {
        let StudentStage::ClosedForm(closed) = &self.student else {
            return Err(needs_closed_form());
        };
        let pictures = Pictures::read(
            Arc::clone(images),
            self.preprocess.clone(),
            &self.device,
            PICTURE_BYTES,
            strict,
            observer,
        )?;
        let all: Vec<usize> = (0..pictures.len()).collect();
        let mut batches = Vec::new();
        let pass = Normals::new(&*closed.teacher, &closed.blocks, &pictures);
        pass.pass(&all, false, Stage::Embed, observer, |embedded| {
            batches.push(embedded.images);
            Ok(())
        })?;
        Ok((Embeddings::joined(&batches)?, pictures))
    }

    /// Brings the threshold up to date after scores have changed; whether one from held-out images had to be dropped.
    fn recalibrate(&mut self) -> Result<bool, Error> {
        let Some(calibration) = self.calibration.take() else {
            return Ok(false);
        };
        if calibration.source == CalibrationSource::HeldOut {
            return Ok(true);
        }
        let rate = FalseAlarmRate::new(calibration.false_alarm_rate)?;
        self.calibrate_on_left_out(rate)?;
        Ok(false)
    }
}

pub(crate) fn needs_closed_form() -> Error {
    Error::Config {
        field: "student",
        value: "masked".into(),
        expected: "closed-form, which can learn more without a new fit".into(),
    }
}
