//! Lines of a table in the format that was asked for.

use std::borrow::Cow;
use std::io::Write;

use anyhow::Result;
use serde::Serialize;

use crate::arguments::Format;

/// Writes a line a row, at once.
pub(crate) enum Table<W: Write> {
    Columns(W),
    Csv(Box<csv::Writer<W>>),
    Json(W),
}

impl<W: Write> Table<W> {
    pub(crate) fn new(format: Format, out: W) -> Self {
        Self::with_header(format, out, true)
    }

    /// `header`: whether a CSV begins with one; it does not behind rows that are there already.
    pub(crate) fn with_header(format: Format, out: W, header: bool) -> Self {
        match format {
            Format::Table => Self::Columns(out),
            Format::Csv => {
                let mut csv = csv::WriterBuilder::new();
                Self::Csv(Box::new(csv.has_headers(header).from_writer(out)))
            }
            Format::Json => Self::Json(out),
        }
    }

    /// Writes `text`, whose columns have tabs between them, or the `row`.
    pub(crate) fn row(&mut self, text: &str, row: &impl Serialize) -> Result<()> {
        match self {
            Self::Columns(out) => writeln!(out, "{text}")?,
            Self::Csv(out) => {
                out.serialize(row)?;
                out.flush()?;
            }
            Self::Json(out) => {
                writeln!(out, "{}", serde_json::to_string(row)?)?;
            }
        }
        Ok(())
    }
}

/// A name in a line of text: tabs, ends of lines and other control characters are escaped.
pub(crate) fn escaped(name: &str) -> Cow<'_, str> {
    if !name.contains(char::is_control) {
        return name.into();
    }
    let escape = |c: char| match c {
        c if c.is_control() => c.escape_default().to_string(),
        c => c.to_string(),
    };
    name.chars().map(escape).collect::<String>().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_break_lines() {
        assert_eq!(escaped("a\tb\nc\\d"), "a\\tb\\nc\\d");
        assert_eq!(escaped("\u{1b}[2J"), "\\u{1b}[2J");
        assert_eq!(escaped("ärger 1.jpg"), "ärger 1.jpg");
    }
}
