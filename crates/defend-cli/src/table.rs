//! Lines of a table in the format that was asked for.

use std::io::Write;

use anyhow::Result;
use serde::Serialize;

use crate::arguments::Format;

/// Writes a line a row, at once.
pub(crate) enum Table<W: Write> {
    Text(W),
    Csv(Box<csv::Writer<W>>),
    Json(W),
}

impl<W: Write> Table<W> {
    pub(crate) fn new(format: Format, out: W) -> Self {
        match format {
            Format::Text => Self::Text(out),
            Format::Csv => Self::Csv(Box::new(csv::Writer::from_writer(out))),
            Format::Json => Self::Json(out),
        }
    }

    /// Writes `text` or the `row`.
    pub(crate) fn row(&mut self, text: &str, row: &impl Serialize) -> Result<()> {
        match self {
            Self::Text(out) => writeln!(out, "{text}")?,
            Self::Csv(out) => {
                out.serialize(row)?;
                out.flush()?;
            }
            Self::Json(out) => {
                serde_json::to_writer(&mut *out, row)?;
                writeln!(out)?;
            }
        }
        Ok(())
    }
}
