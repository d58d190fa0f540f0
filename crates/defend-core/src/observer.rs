//! What a long run tells about itself.

use defend_data::Failure;
use defend_train::TrainingStep;

use crate::Error;

/// Part of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stage {
    /// Decoding and resizing the training images.
    Read,
    /// The teacher's pass over ordinary photos.
    Background,
    /// Dense fine-tuning.
    Dense,
    /// The teacher's pass over the normal images, for the closed form.
    Embed,
    /// Its pass over some of them again, for their patches.
    Patches,
    /// Masked distillation.
    Distill,
    /// Scoring images.
    Score,
}

/// Something that happened in a run.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A stage begins that will handle this many images (over all epochs).
    Started {
        /// The stage.
        stage: Stage,
        /// Images it will handle.
        images: u64,
    },
    /// Some of them are done.
    Advanced {
        /// Images since the last event.
        images: u64,
        /// Loss and gradient of the step, in training stages.
        step: Option<TrainingStep>,
    },
    /// An image was left out.
    Skipped(&'a Failure),
    /// The stage is over.
    Finished {
        /// The stage.
        stage: Stage,
    },
}

/// Role: is notified of a run's progress.
///
/// ```
/// use defend_core::{Event, Observer, Stage};
///
/// /// Counts the images that were scored.
/// #[derive(Default)]
/// struct Scored {
///     scoring: bool,
///     images: u64,
/// }
///
/// impl Observer for Scored {
///     fn on(&mut self, event: &Event<'_>) {
///         match event {
///             Event::Started { stage, .. } => self.scoring = *stage == Stage::Score,
///             Event::Advanced { images, .. } if self.scoring => self.images += images,
///             _ => (),
///         }
///     }
/// }
///
/// let mut scored = Scored::default();
/// scored.on(&Event::Started { stage: Stage::Score, images: 2 });
/// scored.on(&Event::Advanced { images: 2, step: None });
/// assert_eq!(scored.images, 2);
/// ```
pub trait Observer {
    /// Called for every event, on the thread that runs the stage.
    fn on(&mut self, event: &Event<'_>);

    /// Whether the run is to stop; asked after every batch and every step of training. The run then ends with
    /// [`Error::Stopped`](crate::Error::Stopped), and a training run that has checkpoints saves one first.
    fn stops(&self) -> bool {
        false
    }
}

/// Tells of images that are done, and hears whether to go on.
pub(crate) fn advance(observer: &mut dyn Observer, images: usize) -> Result<(), Error> {
    observer.on(&Event::Advanced {
        images: images as u64,
        step: None,
    });
    if observer.stops() {
        return Err(Error::Stopped);
    }
    Ok(())
}

/// Hears nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Observer for Silent {
    fn on(&mut self, _: &Event<'_>) {}
}
