//! Progress on standard error, and a run that Ctrl-C ends between two batches.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::Result;
use defend_core::{Event, Observer, ProgressBar};

use crate::say::{is_quiet, is_verbose, say};

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
pub(crate) struct Progress {
    bar: ProgressBar,
    started: Instant,
}

impl Progress {
    pub(crate) fn new() -> Self {
        Self::with(if is_quiet() {
            ProgressBar::hidden()
        } else {
            ProgressBar::new()
        })
    }

    /// For jobs whose lines show the progress.
    pub(crate) fn hidden() -> Self {
        Self::with(ProgressBar::hidden())
    }

    fn with(bar: ProgressBar) -> Self {
        Self {
            bar,
            started: Instant::now(),
        }
    }
}

impl Observer for Progress {
    fn on(&mut self, event: &Event<'_>) {
        self.bar.on(event);
        match event {
            Event::Started { .. } => self.started = Instant::now(),
            Event::Finished { stage } if is_verbose() => {
                let seconds = self.started.elapsed().as_secs_f64();
                say!("{stage:?}: {seconds:.1} s");
            }
            _ => {}
        }
    }

    fn stops(&self) -> bool {
        is_stopped()
    }
}
