//! Progress on standard error, and a run that Ctrl-C ends between two batches.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use defend_core::{Event, Observer, ProgressBar};

use crate::say::is_quiet;

static STOPPED: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C lets a run end by itself, the second time at once.
pub(crate) fn stop_on_ctrl_c() -> Result<()> {
    ctrlc::set_handler(|| {
        if STOPPED.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    })?;
    Ok(())
}

/// Whether Ctrl-C was pressed.
pub(crate) fn is_stopped() -> bool {
    STOPPED.load(Ordering::Relaxed)
}

/// A bar on a terminal, a line now and then elsewhere.
pub(crate) struct Progress(ProgressBar);

impl Progress {
    pub(crate) fn new() -> Self {
        Self(if is_quiet() {
            ProgressBar::hidden()
        } else {
            ProgressBar::new()
        })
    }

    /// For jobs whose lines show the progress.
    pub(crate) fn hidden() -> Self {
        Self(ProgressBar::hidden())
    }
}

impl Observer for Progress {
    fn on(&mut self, event: &Event<'_>) {
        self.0.on(event);
    }

    fn stops(&self) -> bool {
        is_stopped()
    }
}
