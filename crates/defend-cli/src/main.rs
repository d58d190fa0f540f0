//! The main job on the command line: fit on normal images, calibrate, score, see where, evaluate.
//!
//! `cargo run --release -p defend-cli -- demo`

mod arguments;
mod background;
#[cfg(feature = "bench")]
mod bench;
mod calibrate;
mod demo;
mod embed;
mod evaluate;
mod extend;
mod fit;
mod images;
mod maps;
mod marked;
#[cfg(feature = "parquet")]
mod parquet;
mod score;
mod sort;
mod suspects;
mod table;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use crate::arguments::{Arguments, Command};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let result = run(Arguments::parse().command);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // A reader that has seen enough, such as `head`, is no fault.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("defend: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Fit(arguments) => fit::run(&arguments),
        Command::Background(arguments) => background::run(&arguments),
        Command::Extend(arguments) => extend::run(&arguments),
        Command::Suspects(arguments) => suspects::run(&arguments),
        Command::Sort(arguments) => sort::run(&arguments),
        Command::Embed(arguments) => embed::run(&arguments),
        Command::Calibrate(arguments) => calibrate::run(&arguments),
        Command::Score(arguments) => score::run(&arguments),
        Command::Evaluate(arguments) => evaluate::run(&arguments),
        Command::Demo(arguments) => demo::run(&arguments),
        #[cfg(feature = "bench")]
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Settings(arguments) => {
            println!(
                "{}",
                serde_json::to_string_pretty(&arguments.recipe.config())?
            );
            Ok(())
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
