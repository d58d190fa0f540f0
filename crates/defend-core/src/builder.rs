//! What a fit is asked for.

use std::path::PathBuf;
use std::sync::Arc;

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
            backbone: None,
            strict: false,
            memory: 2 << 30,
            student: None,
            dense: None,
            mask: None,
            objective: None,
            score: None,
            features: None,
            background: BackgroundSource::default(),
            abnormal: None,
            drop_suspects: 0,
        }
    }
}

/// Where the teacher comes from.
pub(crate) enum Source {
    Pretrained(Pretrained),
    Vit(Box<Vit>),
    Own(Arc<dyn Backbone>),
    /// Without CLS attention: for the closed form.
    Encoder(Arc<dyn Encoder>),
}

/// Settings and roles of a fit. Every role has the method's implementation as its default and can be
/// replaced by the user's own.
pub struct DefendBuilder {
    pub(crate) config: DefendConfig,
    pub(crate) device: Device,
    pub(crate) backbone: Option<Source>,
    pub(crate) strict: bool,
    pub(crate) memory: usize,
    pub(crate) student: Option<Arc<dyn Trainable>>,
    pub(crate) dense: Option<Box<dyn DenseObjective>>,
    pub(crate) mask: Option<Box<dyn MaskPolicy>>,
    pub(crate) objective: Option<Arc<dyn DistillObjective>>,
    pub(crate) score: Option<Arc<dyn Score>>,
    pub(crate) background: BackgroundSource,
    pub(crate) abnormal: Option<Arc<dyn Dataset>>,
    pub(crate) drop_suspects: usize,
    pub(crate) features: Option<(PathBuf, Precision)>,
}

impl DefendBuilder {
    /// Where the teacher's weights come from. Without it, the embedded backbone is used.
    #[must_use]
    pub fn backbone(mut self, source: Pretrained) -> Self {
        self.backbone = Some(Source::Pretrained(source));
        self
    }

    /// A teacher that is loaded already. It computes in its own type where neither the dense stage tunes it nor
    /// [`DefendConfig::compute_precision`] is `bf16`.
    #[must_use]
    pub fn teacher(mut self, teacher: Vit) -> Self {
        self.backbone = Some(Source::Vit(Box::new(teacher)));
        self
    }

    /// A teacher supplied by the user. It stays as it is, so [`DefendConfig::dense`] has to be `None`, and without
    /// [`Encoder::tensors`] such a detector cannot be saved.
    #[must_use]
    pub fn own_teacher(mut self, teacher: Arc<dyn Backbone>) -> Self {
        self.backbone = Some(Source::Own(teacher));
        self
    }

    /// A network supplied by the user that gives tokens of its blocks but no CLS attention, for the closed form. Without
    /// [`Encoder::tensors`] such a detector cannot be saved.
    #[must_use]
    pub fn own_encoder(mut self, teacher: Arc<dyn Encoder>) -> Self {
        self.backbone = Some(Source::Encoder(teacher));
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

    /// A student supplied by the user for the masked student stage, in place of a random copy of the teacher's architecture; it is trained in
    /// place. Its features have the teacher's width and grid.
    #[must_use]
    pub fn own_student(mut self, student: Arc<dyn Trainable>) -> Self {
        self.student = Some(student);
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
        self.dense = Some(objective);
        self
    }

    /// Another choice of the patches that the masked student sees.
    #[must_use]
    pub fn mask(mut self, mask: Box<dyn MaskPolicy>) -> Self {
        self.mask = Some(mask);
        self
    }

    /// Another distance between teacher and masked student; such a detector cannot be saved.
    #[must_use]
    pub fn objective(mut self, objective: Arc<dyn DistillObjective>) -> Self {
        self.objective = Some(objective);
        self
    }

    /// Another step from the masked student's patch distances to a score; such a detector cannot be saved.
    #[must_use]
    pub fn score(mut self, score: Arc<dyn Score>) -> Self {
        self.score = Some(score);
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
