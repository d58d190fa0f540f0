//! Where the lines of `defend score` go, and a file of them that a run goes on from.

use std::fs::{File, OpenOptions};
use std::io::{Write, stdout};
use std::path::Path;

use anyhow::{Context, Result, bail};
use defend_core::data::Dataset;
use serde::Deserialize;

use crate::arguments::{Format, Score};
use crate::exit::usage;
use crate::images::{Found, check_writable};
use crate::say::say;

/// Lines that are there already.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Done {
    /// Images with a line.
    pub(super) images: usize,
    pub(super) novel: bool,
    pub(super) unreadable: usize,
    /// Where the last whole line ends.
    bytes: u64,
}

/// What is read back of a line.
#[derive(Deserialize)]
struct Line {
    path: String,
    #[serde(default)]
    threshold: Option<f64>,
    #[serde(default)]
    verdict: Option<String>,
    #[serde(default)]
    error: Option<String>,
}

/// The place that lines are written to, and what is there already when the run goes on.
pub(super) fn open(
    arguments: &Score,
    found: &Found,
    images: &dyn Dataset,
    threshold: Option<f64>,
) -> Result<(Box<dyn Write>, Done)> {
    let Some(path) = &arguments.out else {
        return Ok((Box::new(stdout().lock()), Done::default()));
    };
    let mut inputs = found.paths.clone();
    inputs.extend(arguments.model.clone());
    let path = check_writable(path, &inputs)?;
    // Hours of scores are not lost to a forgotten flag.
    if !arguments.resume && std::fs::metadata(&path).is_ok_and(|found| found.len() > 0) {
        bail!(
            "{} is there already: --resume goes on behind its last line, or remove the file to start anew",
            path.display()
        );
    }
    if !arguments.resume || !path.exists() {
        let file = File::create(&path);
        let file = file.with_context(|| format!("cannot write {}", path.display()))?;
        return Ok((Box::new(file), Done::default()));
    }
    let done = read(&path, arguments.format, Expected { images, threshold })?;
    let file = OpenOptions::new().append(true).open(&path);
    let file = file.with_context(|| format!("cannot write {}", path.display()))?;
    // Half of a line, which a killed run has left.
    file.set_len(done.bytes)?;
    say!(
        "{} images have their line in {}",
        done.images,
        path.display()
    );
    Ok((Box::new(file), done))
}

/// What the lines have to be of.
#[derive(Clone, Copy)]
struct Expected<'a> {
    images: &'a dyn Dataset,
    /// The model's.
    threshold: Option<f64>,
}

/// What every CSV of `defend score` begins with.
const HEADER: &str =
    "path,score,p_value,threshold,verdict,posterior,contrast,patches,known,nearest,map,error\n";
/// What every JSON line of it begins with.
const START: &str = "{\"path\":";

fn read(path: &Path, format: Format, expected: Expected<'_>) -> Result<Done> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    match format {
        Format::Table => Err(usage("--resume needs --format csv or json".into())),
        Format::Csv => of_csv(&bytes, expected),
        Format::Json => of_json(&bytes, expected),
    }
    .with_context(|| format!("cannot go on from {}", path.display()))
}

impl Done {
    /// Whether there is nothing, not even a header.
    pub(super) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Counts a line, which has to be that of the next image.
    fn add(&mut self, line: &Line, of: Expected<'_>) -> Result<()> {
        let images = of.images;
        let expected = images.name(self.images);
        if self.images >= images.len() || line.path != expected {
            bail!(
                "line {} is of {:?}, expected {:?}: give the same images in the same order",
                self.images + 1,
                line.path,
                expected
            );
        }
        if line.error.as_ref().is_none_or(String::is_empty) && line.threshold != of.threshold {
            bail!(
                "line {} has the threshold {:?}, and the model's is {:?}: it is of another model, or of another calibration",
                self.images + 1,
                line.threshold,
                of.threshold
            );
        }
        self.images += 1;
        self.novel |= line.verdict.as_deref() == Some("novel");
        self.unreadable += usize::from(line.error.as_ref().is_some_and(|e| !e.is_empty()));
        Ok(())
    }
}

/// Whether a text may be the beginning of another.
fn may_begin(text: &[u8], whole: &str) -> bool {
    let shared = text.len().min(whole.len());
    text[..shared] == whole.as_bytes()[..shared]
}

fn of_json(bytes: &[u8], of: Expected<'_>) -> Result<Done> {
    let mut done = Done::default();
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        if !may_begin(line, START) {
            bail!("it holds a line that is none of defend score's");
        }
        if !line.ends_with(b"\n") {
            break;
        }
        let found = serde_json::from_slice(line);
        done.add(
            &found.context("it holds a line that is none of defend score's")?,
            of,
        )?;
        done.bytes += line.len() as u64;
    }
    Ok(done)
}

fn of_csv(bytes: &[u8], of: Expected<'_>) -> Result<Done> {
    let mut done = Done::default();
    if !may_begin(bytes, HEADER) {
        bail!("it does not begin with the header of defend score");
    }
    if bytes.len() < HEADER.len() {
        // Not even the header is whole.
        return Ok(done);
    }
    let mut reader = csv::Reader::from_reader(bytes);
    let header = reader.headers()?.clone();
    done.bytes = reader.position().byte();
    let mut record = csv::StringRecord::new();
    loop {
        match reader.read_record(&mut record) {
            Ok(true) => {}
            Ok(false) => return Ok(done),
            // Half of a line is the last.
            Err(_) if reader.is_done() || reader.position().byte() == bytes.len() as u64 => {
                return Ok(done);
            }
            Err(error) => return Err(error.into()),
        }
        let end = reader.position().byte() as usize;
        if end == bytes.len() && !bytes.ends_with(b"\n") {
            return Ok(done);
        }
        done.add(&record.deserialize(Some(&header))?, of)?;
        done.bytes = end as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use defend_core::data::{Memory, RgbImage};

    fn images() -> Memory {
        let mut images = Memory::default();
        for name in ["a.png", "b, \"c\"\n.png", "d.png"] {
            images.push(name.to_owned(), RgbImage::new(1, 1), vec![]);
        }
        images
    }

    const LINES: &str = "a.png,1.5,,1,normal,,,,,,,\n\"b, \"\"c\"\"\n.png\",,,,,,,,,,,broken\nd.png,2,,1,novel,,,,,,,\n";
    const JSON: &str = "{\"path\":\"a.png\",\"threshold\":1.0,\"verdict\":\"normal\"}\n{\"path\":\"b, \\\"c\\\"\\n.png\",\"error\":\"broken\"}\n\
        {\"path\":\"d.png\",\"threshold\":1.0,\"verdict\":\"novel\",\"error\":null}\n";

    #[test]
    fn a_run_goes_on_behind_the_last_whole_line_wherever_it_was_cut() {
        type Read = fn(&[u8], Expected<'_>) -> Result<Done>;
        let images = images();
        let of = Expected {
            images: &images,
            threshold: Some(1.0),
        };
        let csv = format!("{HEADER}{LINES}");
        for (text, read) in [(csv.as_str(), of_csv as Read), (JSON, of_json)] {
            let whole = read(text.as_bytes(), of).unwrap();
            assert_eq!(
                whole,
                Done {
                    images: 3,
                    novel: true,
                    unreadable: 1,
                    bytes: text.len() as u64
                }
            );
            for cut in 0..text.len() {
                let done = read(&text.as_bytes()[..cut], of).unwrap();
                let kept = &text[..done.bytes as usize];
                assert!(kept.is_empty() || kept.ends_with('\n'), "{cut}: {kept:?}");
                assert!(cut - kept.len() < 100, "{cut}: {kept:?}");
                // What was kept is read back alike.
                assert_eq!(read(kept.as_bytes(), of).unwrap(), done);
            }
        }
    }

    #[test]
    fn lines_of_others_are_refused() {
        let images = images();
        let of = |threshold| Expected {
            images: &images,
            threshold,
        };
        let csv = |text: &str| of_csv(text.as_bytes(), of(Some(1.0)));
        for text in [
            "path,score\nb.png,1\n",
            "path\n",
            "a note of mine",
            &format!("{HEADER}b.png,1,,1,normal,,,,,,,\n"),
            &format!("{HEADER}{LINES}e.png,1,,1,normal,,,,,,,\n"),
        ] {
            assert!(csv(text).is_err(), "{text}");
        }
        for text in ["{\"path\":\"d.png\"}\n", "no JSON\n", "no JSON", "{}\n"] {
            assert!(of_json(text.as_bytes(), of(None)).is_err(), "{text}");
        }
        // Another model, or one that was calibrated again.
        let whole = format!("{HEADER}{LINES}");
        assert!(of_csv(whole.as_bytes(), of(Some(1.5))).is_err());
        assert!(of_json(JSON.as_bytes(), of(None)).is_err());
    }
}
