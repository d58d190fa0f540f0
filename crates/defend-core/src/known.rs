//! Learning on: known abnormal images, more normal ones, forgetting.

use std::collections::HashSet;
use std::sync::Arc;

use defend_data::Dataset;
use defend_evidence::Embeddings;
use defend_vit::ImageSource;

use crate::normal_images::NormalImage;
use crate::normals::Normals;
use crate::observer::Observer;
use crate::{CalibrationSource, Detector, Error, ResizedImages, Skipped};

/// Limit of the memory for resized images: they are looked at once.
const IMAGE_BYTES: usize = 64 << 20;

/// What became of a detector that has learnt or forgotten images.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Learnt {
    /// Images that were learnt or forgotten.
    pub images: usize,
    /// Images that could not be read.
    pub skipped: Vec<Skipped>,
    /// Whether the threshold was dropped, since scores have changed: calibrate again. One from left-out values is chosen anew by
    /// itself while there are enough images for it.
    pub calibration_dropped: bool,
}

impl Detector {
    /// Learns what some abnormal images look like, beside those that it knows already: images like them score higher, and none
    /// scores lower. The strongest lever there is: one helps, twenty help a lot, also a little against kinds that were never
    /// shown (docs/RESULTS.md). Where patches count, what is faulty about the images is learnt by a fit alone
    /// ([`DefendBuilder::abnormal`](crate::DefendBuilder::abnormal)), which has the patches of the normal images.
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
        let (embeddings, images) = self.embed(abnormal, strict, observer)?;
        let closed = self.closed_form_mut()?;
        closed
            .evidence
            .learn_abnormal(&embeddings)
            .map_err(|error| match error {
                defend_evidence::Error::AlsoNormal { image } => Error::AlsoNormal {
                    name: images.name(image),
                },
                other => other.into(),
            })?;
        Ok(Learnt {
            images: images.len(),
            skipped: images.skipped().to_vec(),
            calibration_dropped: self.recalibrate()?,
        })
    }

    /// Learns more normal images: the detector is then what a fit on all of them from scratch gives, without a new pass over the
    /// old ones. Of more than 4,000 images only the leaders of groups are there to go on from. Maps go on with the old images' places.
    ///
    /// A failure leaves the detector as it was.
    ///
    /// # Errors
    /// [`Error::Config`] for a masked student; [`Error::AlsoAbnormal`]; [`Error::NoImages`]; [`Error::Evidence`] where patches
    /// count, which are chosen from the images: fit again.
    pub fn learn_normal(
        &mut self,
        normal: impl Dataset + 'static,
        observer: &mut dyn Observer,
    ) -> Result<Learnt, Error> {
        let normal: Arc<dyn Dataset> = Arc::new(normal);
        let (embeddings, images) = self.embed(&normal, false, observer)?;
        let with_copies = self.has_thumbnails();
        let learnt = (0..images.len()).map(|i| NormalImage {
            name: images.name(i),
            hash: images.hash(i),
            thumbnail: with_copies.then(|| images.thumbnail(i)).flatten(),
        });
        self.learn_embeddings(&embeddings, learnt.collect(), images.skipped().to_vec())
    }

    /// Learns more normal images that are embedded.
    pub(crate) fn learn_embeddings(
        &mut self,
        embeddings: &Embeddings,
        images: Vec<NormalImage>,
        skipped: Vec<Skipped>,
    ) -> Result<Learnt, Error> {
        let closed = self.closed_form_mut()?;
        let rows: Vec<usize> = (0..closed.normals.len()).collect();
        let refit = closed.evidence.refit(&rows, Some(embeddings));
        let evidence = refit.map_err(|error| match error {
            defend_evidence::Error::AlsoAbnormal { image } => Error::AlsoAbnormal {
                name: images
                    .get(image)
                    .map(|image| image.name.clone())
                    .unwrap_or_default(),
            },
            other => other.into(),
        })?;
        let learnt = images.len();
        let all = closed.normals.iter().cloned().chain(images).collect();
        closed.replace(evidence, all);
        Ok(Learnt {
            images: learnt,
            skipped,
            calibration_dropped: self.recalibrate()?,
        })
    }

    /// Forgets normal images by their names at the fit, with all patches that are kept of their groups; with `whole_groups` their
    /// near copies too. The detector is then what a fit without them gives. Number of images that were forgotten.
    ///
    /// A failure leaves the detector as it was.
    ///
    /// # Errors
    /// [`Error::Config`] for a masked student; [`Error::UnknownImages`]; [`Error::Evidence`] when none would be left, or where
    /// patches count, which are chosen from the images: fit again.
    pub fn forget(&mut self, names: &[String], whole_groups: bool) -> Result<Learnt, Error> {
        let closed = self.closed_form_mut()?;
        let unknown: Vec<&String> = names
            .iter()
            .filter(|name| !closed.normals.iter().any(|image| image.name == **name))
            .collect();
        if let Some(first) = unknown.first() {
            return Err(Error::UnknownImages {
                count: unknown.len(),
                first: (*first).clone(),
            });
        }
        let groups = &closed.evidence.groups().of;
        let named = |row: usize| {
            closed
                .normals
                .get(row)
                .is_some_and(|image| names.contains(&image.name))
        };
        let odd: HashSet<usize> = (0..groups.len())
            .filter(|&row| named(row))
            .filter_map(|row| groups.get(row).copied())
            .collect();
        let goes = |row: usize| named(row) || (whole_groups && odd.contains(&groups[row]));
        let rows: Vec<usize> = (0..groups.len()).filter(|&row| !goes(row)).collect();
        let forgotten = groups.len() - rows.len();
        let evidence = closed.evidence.refit(&rows, None)?;
        let left = rows
            .iter()
            .filter_map(|&row| closed.normals.get(row).cloned());
        let left = left.collect();
        closed.replace(evidence, left);
        Ok(Learnt {
            images: forgotten,
            skipped: Vec::new(),
            calibration_dropped: self.recalibrate()?,
        })
    }

    /// Whether the fit was asked for small copies of the normal images.
    pub(crate) fn has_thumbnails(&self) -> bool {
        let normals = self.closed_form().map_or(&[][..], |closed| &closed.normals);
        normals.iter().any(|image| image.thumbnail.is_some())
    }

    /// The teacher's embeddings of a data set, in its order without the unreadable images.
    ///
    /// # Errors
    /// [`Error::Config`] for a masked student; as [`ResizedImages::read`]; [`Error::NonFiniteFeatures`].
    pub(crate) fn embed(
        &self,
        images: &Arc<dyn Dataset>,
        strict: bool,
        observer: &mut dyn Observer,
    ) -> Result<(Embeddings, ResizedImages), Error> {
        let closed = self.closed_form()?;
        let images = ResizedImages::read(
            Arc::clone(images),
            self.preprocess.clone(),
            &self.device,
            IMAGE_BYTES,
            strict,
            observer,
        )?;
        let pass = Normals::new(&*closed.teacher, &closed.blocks, &images);
        let embeddings = pass.only_embeddings(observer)?;
        Ok((embeddings, images))
    }

    /// Brings the threshold up to date after scores have changed; whether one from held-out images had to be dropped.
    fn recalibrate(&mut self) -> Result<bool, Error> {
        let Some(calibration) = self.calibration.take() else {
            return Ok(false);
        };
        if calibration.source == CalibrationSource::HeldOut {
            return Ok(true);
        }
        Ok(!self.calibrate_if_enough(calibration.promise()?)?)
    }
}
