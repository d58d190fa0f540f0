//! A progress bar on the terminal.

use indicatif::{ProgressBar as Bar, ProgressStyle};

use crate::{Event, Observer, Stage};

/// Shows rate and time left of each stage on standard error, and nothing when that is no terminal;
/// skipped images are always named there.
#[derive(Debug)]
pub struct ProgressBar {
    bar: Bar,
    visible: bool,
}

impl ProgressBar {
    /// A bar that appears with the first stage.
    pub fn new() -> Self {
        Self {
            bar: Bar::hidden(),
            visible: true,
        }
    }

    /// Never a bar: only skipped images are named, for programs that write to the terminal themselves.
    pub fn hidden() -> Self {
        Self {
            bar: Bar::hidden(),
            visible: false,
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
                let template =
                    "{prefix:>12} {wide_bar} {pos}/{len} images, {per_sec}, {eta} left {msg}";
                let style = ProgressStyle::with_template(template);
                self.bar = Bar::new(*images).with_prefix(title);
                if let Ok(style) = style {
                    self.bar.set_style(style);
                }
            }
            Event::Advanced { images, loss } => {
                if let Some(loss) = loss {
                    self.bar.set_message(format!("loss {loss:.4}"));
                }
                self.bar.inc(*images);
            }
            Event::Skipped(failure) => {
                // Not println on the bar: a hidden bar would swallow the name.
                self.bar
                    .suspend(|| eprintln!("skipped {}: {}", failure.name, failure.error));
            }
            Event::Started { .. } => {}
            Event::Finished { .. } => self.bar.finish_and_clear(),
        }
    }
}
