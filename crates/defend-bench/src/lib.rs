//! The benchmark of the paper as anyone can rerun it: data sets, protocols and methods to tables, resumable and
//! reproducible.
//!
//! A [`BenchConfig`] in TOML names data sets in their published layouts, protocols and methods. [`run`] does every run
//! whose [`Record`] is missing, one JSON file a run, and can be killed and started again at any moment. [`report`]
//! makes tables (Markdown, CSV, LaTeX) with bootstrap intervals and paired comparisons, plots, and a page that shows
//! the worst errors.

mod config;
mod data;
mod error;
mod group;
mod objects;
mod page;
mod pixels;
mod plots;
mod protocol;
mod record;
mod report;
mod run;
mod split;
mod table;

pub use config::{BenchConfig, DataEntry, MethodEntry, Subset};
pub use data::DataConfig;
pub use error::Error;
pub use pixels::PIXEL_SIDE;
pub use protocol::ProtocolConfig;
pub use record::{Figures, Record, RunKey, Scored, Software, Worst};
pub use report::{Report, report};
pub use run::{Progress, RunState, run};
pub use split::Split;
pub use table::Table;
