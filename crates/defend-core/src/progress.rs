//! A progress bar on the terminal.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar as Bar, ProgressStyle};

use crate::{Event, Observer, Stage};

/// How often a line is written where standard error is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(30);

/// Shows rate and time left of each stage on standard error: as a bar on a terminal, elsewhere as a line every 30 seconds. Skipped images are
/// always named there.
#[derive(Debug)]
pub struct ProgressBar {
    bar: Bar,
    visible: bool,
    lines: Option<Lines>,
}

/// A stage that is told of in lines.
#[derive(Debug)]
struct Lines {
    title: &'static str,
    images: u64,
    done: u64,
    started: Instant,
    last: Instant,
}

impl Lines {
    fn advance(&mut self, images: u64) {
        self.done += images;
        if self.last.elapsed() < LINE_EVERY {
            return;
        }
        self.last = Instant::now();
        let seconds = self.started.elapsed().as_secs_f64();
        let left = seconds * self.images.saturating_sub(self.done) as f64 / self.done.max(1) as f64;
        let Self {
            title,
            images,
            done,
            ..
        } = self;
        let _ = writeln!(
            std::io::stderr(),
            "{title}: {done} of {images} images after {seconds:.0} s, about {left:.0} s left"
        );
    }
}

impl ProgressBar {
    /// A bar that appears with the first stage.
    pub fn new() -> Self {
        Self {
            bar: Bar::hidden(),
            visible: true,
            lines: None,
        }
    }

    /// Never a bar: only skipped images are named, for programs that write to the terminal themselves.
    pub fn hidden() -> Self {
        Self {
            bar: Bar::hidden(),
            visible: false,
            lines: None,
        }
    }
}

impl Default for ProgressBar {
    fn default() -> Self {
        Self::new()
    }
}

impl Observer for ProgressBar {
    fn on(&mut self, event: &Event<'_>) {
        match event {
            Event::Started { stage, images } if self.visible => {
                let title = match stage {
                    Stage::Read => "reading",
                    Stage::Background => "background",
                    Stage::Embed => "embedding",
                    Stage::Patches => "patches",
                    Stage::Dense => "dense tuning",
                    Stage::Distill => "distilling",
                    Stage::Score => "scoring",
                };
                if !std::io::stderr().is_terminal() {
                    self.lines = Some(Lines {
                        title,
                        images: *images,
                        done: 0,
                        started: Instant::now(),
                        last: Instant::now(),
                    });
                    return;
                }
                let template =
                    "{prefix:>12} {wide_bar} {pos}/{len} images, {per_sec}, {eta} left {msg}";
                let style = ProgressStyle::with_template(template);
                self.bar = Bar::new(*images).with_prefix(title);
                if let Ok(style) = style {
                    self.bar.set_style(style);
                }
            }
            Event::Advanced { images, step } => {
                if let Some(step) = step {
                    self.bar.set_message(format!(
                        "loss {:.4}, gradient {:.2e}",
                        step.loss, step.gradient_norm
                    ));
                }
                self.bar.inc(*images);
                if let Some(lines) = &mut self.lines {
                    lines.advance(*images);
                }
            }
            Event::Skipped(failure) => {
                // Not println on the bar: a hidden bar would swallow the name.
                self.bar.suspend(|| {
                    let _ = writeln!(
                        std::io::stderr(),
                        "skipped {}: {}",
                        failure.name,
                        failure.error
                    );
                });
            }
            Event::Started { .. } => {}
            Event::Finished { .. } => {
                self.bar.finish_and_clear();
                self.lines = None;
            }
        }
    }
}
