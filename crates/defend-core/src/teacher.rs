//! The teacher of a fit, and what a masked student starts from.

use std::sync::Arc;

use candle_core::Device;
use defend_nn::Rng;
use defend_vit::{
    Backbone, BackboneSpec, CacheConfig, Cached, ComputePrecision, Encoder, TrainScope, Vit,
};

use crate::builder::TeacherSource;
use crate::fit::stream;
use crate::{DefendConfig, Error, MaskedConfig};

/// The teacher before the dense stage.
pub(crate) enum Teacher {
    Vit(Box<Vit>),
    Own(Arc<dyn Backbone>),
    Encoder(Arc<dyn Encoder>),
}

impl Teacher {
    pub(crate) fn encoder(&self) -> &dyn Encoder {
        match self {
            Self::Vit(vit) => &**vit,
            Self::Own(own) => &**own,
            Self::Encoder(own) => &**own,
        }
    }

    /// Whether its features can hold the layers that are compared.
    pub(crate) fn check_layers(&self, layers: usize) -> Result<(), Error> {
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
    pub(crate) fn frozen_encoder(
        self,
        compute_precision: ComputePrecision,
    ) -> Result<Arc<dyn Encoder>, Error> {
        Ok(match self {
            Self::Vit(vit) => Arc::new(frozen(&vit, compute_precision)?),
            Self::Own(own) => own,
            Self::Encoder(own) => own,
        })
    }

    /// Frozen, with the layers that a masked student is compared at.
    pub(crate) fn frozen_backbone(
        self,
        compute_precision: ComputePrecision,
        layers: usize,
    ) -> Result<Arc<dyn Backbone>, Error> {
        match self {
            Self::Vit(vit) => Ok(Arc::new(
                frozen(&vit, compute_precision)?.with_layers(layers)?,
            )),
            Self::Own(own) => Ok(own),
            Self::Encoder(_) => Err(needs_backbone()),
        }
    }
}

/// A masked student was asked for with an encoder.
pub(crate) fn needs_backbone() -> Error {
    Error::Config {
        field: "student",
        value: "masked".into(),
        expected: "closed-form for an encoder, which has no CLS attention and no layers to compare"
            .into(),
    }
}

/// The teacher as it enters the dense stage, with the blocks trainable that this stage trains.
pub(crate) fn load_teacher(
    source: Option<TeacherSource>,
    config: &DefendConfig,
    device: &Device,
) -> Result<Teacher, Error> {
    let dense_blocks = config.dense.as_ref().map(|d| d.trained_blocks);
    let scope = dense_blocks.map_or(TrainScope::Frozen, TrainScope::LastBlocks);
    let vit = match source {
        Some(TeacherSource::Backbone(_) | TeacherSource::Encoder(_)) if config.dense.is_some() => {
            return Err(Error::Config {
                field: "dense",
                value: "set".into(),
                expected: "null with a custom teacher, which cannot be fine-tuned".into(),
            });
        }
        Some(TeacherSource::Backbone(_) | TeacherSource::Encoder(_))
            if config.image_size.is_some() =>
        {
            return Err(Error::Config {
                field: "image_size",
                value: "set".into(),
                expected: "null with a custom teacher, whose spec says its size".into(),
            });
        }
        Some(TeacherSource::Backbone(own)) => return Ok(Teacher::Own(own)),
        Some(TeacherSource::Encoder(own)) => return Ok(Teacher::Encoder(own)),
        Some(TeacherSource::Vit(vit)) => vit.copy_to(scope, device)?,
        Some(TeacherSource::Pretrained(source)) => source.load(scope, device)?,
        #[cfg(feature = "embedded")]
        None => crate::embedded_backbone().load(scope, device)?,
        #[cfg(not(feature = "embedded"))]
        None => {
            return Err(Error::Config {
                field: "teacher",
                value: "not set".into(),
                expected: "a teacher, or the feature \"embedded\"".into(),
            });
        }
    };
    let vit = match config.image_size {
        Some(size) => vit.resized(size, scope)?,
        None => vit,
    };
    Ok(Teacher::Vit(Box::new(vit)))
}

/// A copy of a network that trains no more.
pub(crate) fn frozen(vit: &Vit, compute_precision: ComputePrecision) -> Result<Vit, Error> {
    Ok(match compute_precision {
        // As it is: a frozen teacher may compute in another type already.
        ComputePrecision::F32 => vit.copy(TrainScope::Frozen)?,
        ComputePrecision::Bf16 => vit.with_compute_precision(compute_precision)?,
    })
}

/// The teacher, with its features kept in a folder if asked for.
pub(crate) fn kept(
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

/// A random student for a teacher.
pub(crate) fn student(
    teacher: &BackboneSpec,
    seed: u64,
    settings: &MaskedConfig,
    device: &Device,
) -> Result<Vit, Error> {
    let mut rng = Rng::stream(seed, stream::STUDENT);
    let drop_path = settings.distill.drop_path;
    Ok(Vit::random(teacher.clone(), drop_path, &mut rng, device)?)
}
