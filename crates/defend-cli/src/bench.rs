//! `defend bench`: data sets, protocols and methods to tables.

use std::path::PathBuf;

use anyhow::Result;
use defend_bench::{BenchConfig, Progress, RunState};
use defend_core::{Event, Observer};

use crate::arguments::Bench;
use crate::exit::Exit;
use crate::progress;
use crate::say::say;
use crate::say::tell;

pub(crate) fn run(arguments: &Bench) -> Result<Exit> {
    let mut config = BenchConfig::read(&arguments.config, arguments.root.as_deref())?;
    if let Some(out) = &arguments.out {
        config.output.clone_from(out);
    }
    if !arguments.report_only {
        let device = arguments.common.device()?;
        let mut progress = Lines {
            bar: progress::Progress::new(),
            fresh: 0,
            known_until: 0.0,
        };
        defend_bench::run(&config, &device, &mut progress)?;
    }
    let mut outputs = vec![config.output.as_path()];
    outputs.extend(arguments.with.iter().map(PathBuf::as_path));
    let report = defend_bench::report(&outputs, &config.root, &mut left_out)?;
    for table in &report.tables {
        tell!("{}", table.markdown())?;
    }
    say!("{}", report.page.display());
    Ok(Exit::default())
}

fn left_out(what: &defend_bench::Error) {
    match std::error::Error::source(what) {
        Some(source) => say!("{what}: {source}"),
        None => say!("left out: {what}"),
    }
}

/// A line a run, with the time that is left.
struct Lines {
    bar: progress::Progress,
    fresh: usize,
    /// Seconds that went by before the first fresh run ended.
    known_until: f64,
}

impl Observer for Lines {
    fn on(&mut self, event: &Event<'_>) {
        self.bar.on(event);
    }

    fn stops(&self) -> bool {
        self.bar.stops()
    }
}

impl Progress for Lines {
    fn left_out(&mut self, what: &defend_bench::Error) {
        left_out(what);
    }

    fn run(&mut self, state: &RunState<'_>) {
        if state.known {
            self.known_until = state.seconds;
            return;
        }
        self.fresh += 1;
        let each = (state.seconds - self.known_until) / self.fresh as f64;
        let key = &state.record.key;
        say!(
            "{}/{}  {} {} {}, {}, seed {}: AUROC {:.4}, {:.0} s; about {:.0} min left",
            state.done,
            state.total,
            key.data,
            key.protocol,
            key.experiment,
            key.method,
            key.seed,
            state.record.figures.auroc,
            state.record.fit_seconds + state.record.score_seconds,
            each * (state.total - state.done) as f64 / 60.0,
        );
    }
}
