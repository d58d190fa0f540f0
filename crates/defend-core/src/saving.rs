//! Where a fit is saved while it trains.

use defend_train::Checkpoints;
use defend_vit::ImageSource;

use crate::builder::FitCheckpoints;
use crate::teacher::Teacher;
use crate::{DefendConfig, Error, ResizedImages, TeacherIdentity};

/// A folder of checkpoints, one for each stage, and all that the bits of a fit depend on.
pub(crate) struct Saving {
    place: FitCheckpoints,
    run: String,
}

impl Saving {
    /// `parts`: what else its bits depend on: custom roles, how features are kept, the device.
    pub(crate) fn new(
        place: FitCheckpoints,
        config: &DefendConfig,
        teacher: &Teacher,
        images: &ResizedImages,
        parts: &str,
    ) -> Result<Self, Error> {
        std::fs::create_dir_all(&place.folder).map_err(|source| Error::Io {
            path: place.folder.clone(),
            action: "making the folder of the checkpoints",
            source,
        })?;
        // A custom teacher may not show its tensors: its name has to do.
        let teacher = match TeacherIdentity::new(teacher.encoder(), config.resize_mode) {
            Ok(identity) => identity.to_string(),
            Err(_) => teacher.encoder().spec().name.clone(),
        };
        let mut names = blake3::Hasher::new();
        for image in 0..images.len() {
            names.update(images.name(image).as_bytes());
            names.update(&[0]);
        }
        let run = format!(
            "{config:?}, teacher {teacher}, {parts}, {} images {}",
            images.len(),
            names.finalize().to_hex()
        );
        Ok(Self { place, run })
    }

    /// The checkpoints of a stage.
    pub(crate) fn stage(&self, name: &str) -> Checkpoints {
        let path = self.place.folder.join(format!("{name}.checkpoint"));
        Checkpoints::new(path, format!("{name}: {}", self.run))
            .every(self.place.every)
            .resuming(self.place.resume)
    }
}
