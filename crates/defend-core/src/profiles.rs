//! Many models on one teacher: one pass scores an image against all.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Tensor};
use defend_data::{Dataset, Failure, Preprocess};
use defend_vit::Encoder;

use crate::closed_form::ClosedFormStudent;
use crate::scan::ScoredBy;
use crate::tokens::{TokenBlocks, Wanted};
use crate::{Detector, Error, Maps, Novelty, Observer, TeacherIdentity, scan_each};

/// Models of one teacher, in closed form: what each calls normal is a *profile*. The teacher's pass, by far the most of the work,
/// is done once an image; a profile adds less than a hundredth of it (docs/PERFORMANCE.md).
///
/// ```no_run
/// use defend_core::prelude::*;
/// use defend_core::{ProfileSet, best_device};
///
/// let profiles = ProfileSet::load(&["cats.defend", "dogs.defend"], &best_device())?;
/// let images = std::sync::Arc::new(ImageFolder::open("new/")?) as std::sync::Arc<dyn Dataset>;
/// profiles.scan_each(&images, &mut Silent, &mut |outcome| {
///     if let Ok((name, novelties)) = outcome {
///         println!("{name} {} {}", novelties[0].score, novelties[1].score);
///     }
///     Ok::<(), defend_core::Error>(())
/// })?;
/// # Ok::<(), defend_core::Error>(())
/// ```
pub struct ProfileSet {
    names: Vec<String>,
    detectors: Vec<Detector>,
}

/// How the first model looks at images.
struct First {
    identity: TeacherIdentity,
    teacher: Arc<dyn Encoder>,
    preprocess: Preprocess,
    blocks: TokenBlocks,
}

/// An image's name and what each profile says of it, or why it could not be read.
pub type ProfileOutcome = Result<(String, Vec<Novelty>), Failure>;

impl ProfileSet {
    /// Named models; they share the first one's teacher in memory.
    ///
    /// # Errors
    /// [`Error::Config`] without any, and for a masked student; [`Error::OtherProfile`] for a model whose teacher or
    /// preparation of images is not the first one's.
    pub fn new(models: Vec<(String, Detector)>) -> Result<Self, Error> {
        let (names, mut detectors): (Vec<String>, Vec<Detector>) = models.into_iter().unzip();
        let mut first: Option<First> = None;
        for (name, detector) in names.iter().zip(&mut detectors) {
            let (fit, preprocess) = (detector.config.resize_mode, detector.preprocess.clone());
            let closed = detector.closed_form_mut()?;
            let identity = TeacherIdentity::new(&*closed.teacher, fit)?;
            match &first {
                None => {
                    first = Some(First {
                        identity,
                        teacher: Arc::clone(&closed.teacher),
                        preprocess,
                        blocks: closed.blocks.clone(),
                    });
                }
                Some(first) => {
                    let same = first.preprocess == preprocess && first.blocks == closed.blocks;
                    if !identity.fits(&first.identity) || !same {
                        return Err(Error::OtherProfile {
                            model: name.clone(),
                            found: identity.to_string(),
                            expected: first.identity.to_string(),
                        });
                    }
                    closed.teacher = Arc::clone(&first.teacher);
                }
            }
        }
        if detectors.is_empty() {
            return Err(Error::Config {
                field: "profiles",
                value: "empty".into(),
                expected: "at least one model".into(),
            });
        }
        Ok(Self { names, detectors })
    }

    /// Reads model files; their paths are the names.
    ///
    /// # Errors
    /// As [`Detector::load`] and [`ProfileSet::new`].
    pub fn load<P: AsRef<Path>>(paths: &[P], device: &Device) -> Result<Self, Error> {
        let one = |path: &P| {
            let path = path.as_ref();
            Ok((path.display().to_string(), Detector::load(path, device)?))
        };
        Self::new(paths.iter().map(one).collect::<Result<_, Error>>()?)
    }

    /// Names of the models, in their order.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The models, in their order.
    pub fn detectors(&self) -> &[Detector] {
        &self.detectors
    }

    /// What each profile says of a batch `[B, 3, H, W]`: a vector of `B` for each.
    ///
    /// # Errors
    /// When the images do not fit.
    pub fn score(&self, images: &Tensor) -> Result<Vec<Vec<Novelty>>, Error> {
        let students = self.detectors.iter().map(Detector::closed_form);
        let students: Vec<&ClosedFormStudent> = students.collect::<Result<_, _>>()?;
        let Some(first) = students.first() else {
            return Ok(Vec::new());
        };
        let patches = students.iter().any(|student| student.wanted(false).patches);
        let wanted = Wanted {
            patches,
            places: false,
        };
        for detector in &self.detectors {
            detector.check(images)?;
        }
        let embedded = first.embed(images, wanted)?;
        let of_profile = |(student, detector): (&&ClosedFormStudent, &Detector)| {
            let mut novelties = student.judge(&embedded, false)?;
            detector.decide(&mut novelties)?;
            Ok(novelties)
        };
        students
            .iter()
            .zip(&self.detectors)
            .map(of_profile)
            .collect()
    }

    /// Scores every image of a data set against all profiles, in constant memory.
    ///
    /// # Errors
    /// As [`scan_each`].
    pub fn scan_each<E: From<Error>>(
        &self,
        images: &Arc<dyn Dataset>,
        observer: &mut dyn Observer,
        on_result: &mut dyn FnMut(ProfileOutcome) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(first) = self.detectors.first() else {
            return Ok(());
        };
        // What all profiles say, until the image is handed on; the first one stands for them in the run.
        let rows: Mutex<VecDeque<Vec<Novelty>>> = Mutex::new(VecDeque::new());
        let rows = || rows.lock().unwrap_or_else(PoisonError::into_inner);
        let pass = ScoredBy {
            detector: first,
            score: |images: &Tensor| {
                let scored = self.score(images)?;
                let first = scored.first().cloned().unwrap_or_default();
                let of_image = |i| {
                    (scored
                        .iter()
                        .filter_map(|p: &Vec<Novelty>| p.get(i).cloned()))
                    .collect()
                };
                rows().extend((0..first.len()).map(of_image));
                Ok(first)
            },
        };
        scan_each::<E>(&pass, images, Maps::Free, observer, &mut |outcome| {
            on_result(match outcome {
                Ok((finding, _)) => {
                    let row = rows().pop_front().unwrap_or_default();
                    Ok((finding.name, row))
                }
                Err(failure) => Err(failure),
            })
        })
    }
}
