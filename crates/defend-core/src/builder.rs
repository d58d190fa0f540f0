//! What a fit is asked for.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use candle_core::Device;
use defend_data::Dataset;
use defend_dense::DenseObjective;
use defend_distill::{DistillObjective, MaskPolicy, Score};
use defend_vit::{Backbone, Encoder, Precision, Pretrained, Trainable, Vit};

use crate::background::BackgroundSource;
use crate::{DefendConfig, Recipe};

/// Entry to the library.
#[derive(Debug, Clone, Copy)]
pub struct Defend;

impl Defend {
    /// A detector with the default settings, to be changed step by step.
    pub fn builder() -> DefendBuilder {
        DefendBuilder {
            config: DefendConfig::default(),
            device: Device::Cpu,
            teacher: None,
            strict: false,
            memory: 2 << 30,
            roles: Roles::default(),
            features: None,
            checkpoints: None,
            background: BackgroundSource::default(),
            abnormal: None,
            drop_suspects: 0,
            thumbnails: false,
        }
    }
}

/// Where the teacher comes from: made from a [`Pretrained`], a [`Vit`], an `Arc<dyn Backbone>` or an `Arc<dyn Encoder>`.
pub enum TeacherSource {
    /// Weights from the hub, a file, a folder or memory.
    Pretrained(Pretrained),
    /// A network that is loaded already. It computes in its own type where neither the dense stage tunes it nor
    /// [`DefendConfig::compute_precision`] is `bf16`.
    Vit(Box<Vit>),
    /// A custom network. It stays as it is, so [`DefendConfig::dense`] has to be `None`, and without [`Encoder::tensors`] such a
    /// detector cannot be saved.
    Backbone(Arc<dyn Backbone>),
    /// The same without CLS attention, for the closed form.
    Encoder(Arc<dyn Encoder>),
}

impl From<Pretrained> for TeacherSource {
    fn from(weights: Pretrained) -> Self {
        Self::Pretrained(weights)
    }
}

impl From<Vit> for TeacherSource {
    fn from(vit: Vit) -> Self {
        Self::Vit(Box::new(vit))
    }
}

impl From<Arc<dyn Backbone>> for TeacherSource {
    fn from(backbone: Arc<dyn Backbone>) -> Self {
        Self::Backbone(backbone)
    }
}

impl From<Arc<dyn Encoder>> for TeacherSource {
    fn from(encoder: Arc<dyn Encoder>) -> Self {
        Self::Encoder(encoder)
    }
}

/// Custom parts of the trained stages; the library's own where there is none.
#[derive(Default)]
pub(crate) struct Roles {
    pub(crate) student: Option<Arc<dyn Trainable>>,
    pub(crate) dense_objective: Option<Box<dyn DenseObjective>>,
    pub(crate) mask: Option<Box<dyn MaskPolicy>>,
    pub(crate) objective: Option<Arc<dyn DistillObjective>>,
    pub(crate) score: Option<Arc<dyn Score>>,
}

impl Roles {
    /// Each role and whether it is taken.
    pub(crate) fn taken(&self) -> [(&'static str, bool); 5] {
        [
            ("student", self.student.is_some()),
            ("dense_objective", self.dense_objective.is_some()),
            ("mask", self.mask.is_some()),
            ("objective", self.objective.is_some()),
            ("score", self.score.is_some()),
        ]
    }

    /// The roles that custom parts have.
    pub(crate) fn custom(&self) -> Vec<&'static str> {
        let taken = self.taken().into_iter().filter(|(_, taken)| *taken);
        taken.map(|(role, _)| role).collect()
    }
}

/// Where the training stages of a fit are saved while they run, and how often.
#[derive(Debug, Clone)]
pub struct FitCheckpoints {
    pub(crate) folder: PathBuf,
    pub(crate) every: Duration,
    pub(crate) resume: bool,
}

impl FitCheckpoints {
    /// Checkpoints in a folder, which is made if need be; every ten minutes.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
            every: Duration::from_mins(10),
            resume: false,
        }
    }

    /// Time between two of them; zero saves after every step.
    #[must_use]
    pub fn every(mut self, interval: Duration) -> Self {
        self.every = interval;
        self
    }

    /// Goes on from those that are in the folder. Without it a fit refuses to start over them.
    #[must_use]
    pub fn resuming(mut self, resume: bool) -> Self {
        self.resume = resume;
        self
    }
}

/// Settings and roles of a fit. Every role has the method's implementation as its default and can be
/// replaced by the user's own.
pub struct DefendBuilder {
    pub(crate) config: DefendConfig,
    pub(crate) device: Device,
    pub(crate) teacher: Option<TeacherSource>,
    pub(crate) strict: bool,
    pub(crate) memory: usize,
    pub(crate) roles: Roles,
    pub(crate) background: BackgroundSource,
    pub(crate) abnormal: Option<Arc<dyn Dataset>>,
    pub(crate) drop_suspects: usize,
    pub(crate) thumbnails: bool,
    pub(crate) features: Option<(PathBuf, Precision)>,
    pub(crate) checkpoints: Option<FitCheckpoints>,
}

impl DefendBuilder {
    /// The network whose features are learnt: weights ([`Pretrained`]), a [`Vit`], or a custom network. Without it, the embedded
    /// backbone.
    #[must_use]
    pub fn teacher(mut self, teacher: impl Into<TeacherSource>) -> Self {
        self.teacher = Some(teacher.into());
        self
    }

    /// What images look like in general, for the closed form: a [`crate::Background`] that was made before, or photos
    /// ([`BackgroundSource::Photos`]). Without it, the one that ships with the embedded backbone where that is the teacher.
    #[must_use]
    pub fn background(mut self, background: impl Into<BackgroundSource>) -> Self {
        self.background = background.into();
        self
    }

    /// Known abnormal images, for the closed form: see [`Detector::learn_abnormal`](crate::Detector::learn_abnormal). Where patches
    /// count, their faulty patches are learnt too: those under [`Dataset::mask`], and without a mask the worst of each image.
    #[must_use]
    pub fn abnormal(mut self, images: impl Dataset + 'static) -> Self {
        self.abnormal = Some(Arc::new(images));
        self
    }

    /// Leaves the `count` oddest groups of normal images out, for the closed form: those that
    /// [`Detector::suspects`](crate::Detector::suspects) names. For folders that are known to hold some images that do not belong.
    #[must_use]
    pub fn drop_suspects(mut self, count: usize) -> Self {
        self.drop_suspects = count;
        self
    }

    /// Keeps small copies of the normal images in the model, at most 128 pixels a side, for reports that show them beside new ones; for the
    /// closed form. Off by default: whoever has the model then has these pictures.
    #[must_use]
    pub fn thumbnails(mut self, keep: bool) -> Self {
        self.thumbnails = keep;
        self
    }

    /// A custom student for the masked student stage, in place of a random copy of the teacher's architecture; it is trained in
    /// place. Its features have the teacher's width and grid.
    #[must_use]
    pub fn student(mut self, student: Arc<dyn Trainable>) -> Self {
        self.roles.student = Some(student);
        self
    }

    /// Saves the training stages while they run: the dense stage and the masked student's. A fit that was killed goes on and ends with
    /// the same bits, on the same images (known by their names), teacher, settings, device and custom parts (known by their roles).
    #[must_use]
    pub fn checkpoints(mut self, checkpoints: FitCheckpoints) -> Self {
        self.checkpoints = Some(checkpoints);
        self
    }

    /// All settings of a recipe.
    #[must_use]
    pub fn recipe(self, recipe: Recipe) -> Self {
        self.config(recipe.config())
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

    /// Limit of the memory for resized images, bytes; 2 GiB by default, enough for 14,000.
    #[must_use]
    pub fn image_memory(mut self, bytes: usize) -> Self {
        self.memory = bytes;
        self
    }

    /// Another objective for the dense stage.
    #[must_use]
    pub fn dense_objective(mut self, objective: Box<dyn DenseObjective>) -> Self {
        self.roles.dense_objective = Some(objective);
        self
    }

    /// Another choice of the patches that the masked student sees.
    #[must_use]
    pub fn mask(mut self, mask: Box<dyn MaskPolicy>) -> Self {
        self.roles.mask = Some(mask);
        self
    }

    /// Another distance between teacher and masked student; such a detector cannot be saved.
    #[must_use]
    pub fn objective(mut self, objective: Arc<dyn DistillObjective>) -> Self {
        self.roles.objective = Some(objective);
        self
    }

    /// Another step from the masked student's patch distances to a score; such a detector cannot be saved.
    #[must_use]
    pub fn score(mut self, score: Arc<dyn Score>) -> Self {
        self.roles.score = Some(score);
        self
    }

    /// For the masked student: keeps the teacher's features of the training images in a folder, so that another fit on the same images, weights
    /// and size does not compute them again: 150 KB an image for ViT-Ti, half of it with [`Precision::Half`]. The teacher
    /// of the dense stage is another one in each fit, so this pays without it.
    #[must_use]
    pub fn feature_folder(mut self, folder: impl Into<PathBuf>, precision: Precision) -> Self {
        self.features = Some((folder.into(), precision));
        self
    }
}
