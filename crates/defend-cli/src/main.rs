//! The main job on the command line: fit on normal images, calibrate, score, see where, evaluate.
//!
//! `cargo run --release -p defend-cli -- demo`

mod arguments;
mod background;
#[cfg(feature = "bench")]
mod bench;
mod calibrate;
mod demo;
mod drift;
mod embed;
mod evaluate;
mod exit;
mod extend;
mod fit;
mod images;
mod inspect;
mod maps;
mod marked;
#[cfg(feature = "parquet")]
mod parquet;
mod progress;
mod report;
mod say;
mod score;
mod settings;
mod sort;
mod suspects;
mod table;
mod watch;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory, Parser};

use crate::arguments::{Arguments, Command};
use crate::exit::Exit;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match run(&Arguments::parse().command) {
        Ok(mut exit) => {
            exit.unreadable |= images::met_unreadable_folder();
            exit.into()
        }
        // A reader that has seen enough, such as `head`, is no fault; but nothing is known of the images that it did not see.
        Err(error) if is_broken_pipe(&error) => Exit::CLOSED_PIPE.into(),
        Err(error) => {
            if let Some(usage) = error.downcast_ref::<clap::Error>() {
                let _ = usage.print();
                return Exit::USAGE.into();
            }
            let _ = writeln!(std::io::stderr(), "defend: {error:#}");
            Exit::FAILED.into()
        }
    }
}

fn run(command: &Command) -> Result<Exit> {
    if let Some(common) = command.common() {
        common.set_up()?;
    }
    progress::stop_on_ctrl_c()?;
    match command {
        Command::Fit(arguments) => fit::run(arguments),
        Command::Background(arguments) => background::run(arguments),
        Command::Extend(arguments) => extend::run(arguments),
        Command::Suspects(arguments) => suspects::run(arguments),
        Command::Sort(arguments) => sort::run(arguments),
        Command::Embed(arguments) => embed::run(arguments),
        Command::Calibrate(arguments) => calibrate::run(arguments),
        Command::Score(arguments) => score::run(arguments),
        Command::Report(arguments) => report::run(arguments),
        Command::Evaluate(arguments) => evaluate::run(arguments),
        Command::Watch(arguments) => watch::run(arguments),
        Command::Inspect(arguments) => inspect::run(arguments),
        Command::Drift(arguments) => drift::run(arguments),
        Command::Demo(arguments) => demo::run(arguments),
        #[cfg(feature = "bench")]
        Command::Bench(arguments) => bench::run(arguments),
        Command::Settings(arguments) => settings::run(arguments),
        Command::Completions(arguments) => {
            // Into memory first: the generator panics where it cannot write.
            let mut script = Vec::new();
            clap_complete::generate(
                arguments.shell,
                &mut Arguments::command(),
                "defend",
                &mut script,
            );
            std::io::stdout().write_all(&script)?;
            Ok(Exit::default())
        }
        Command::Man(arguments) => {
            images::make_folder(&arguments.folder)?;
            clap_mangen::generate_to(Arguments::command(), &arguments.folder)?;
            Ok(Exit::default())
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    })
}
