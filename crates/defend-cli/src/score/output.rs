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
    verdict: Option<String>,
    #[serde(default)]
    error: Option<String>,
}

/// The place that lines are written to, and what is there already when the run goes on.
pub(super) fn open(
    arguments: &Score,
    found: &Found,
    images: &dyn Dataset,
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
    let done = read(&path, arguments.format, images)?;
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

fn read(path: &Path, format: Format, images: &dyn Dataset) -> Result<Done> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    match format {
        Format::Table => Err(usage("--resume needs --format csv or json".into())),
        Format::Csv => of_csv(&bytes, images),
        Format::Json => of_json(&bytes, images),
    }
    .with_context(|| format!("cannot go on from {}", path.display()))
}

impl Done {
    /// Whether there is nothing, not even a header.
    pub(super) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Counts a line, which has to be that of the next image.
    fn add(&mut self, line: &Line, images: &dyn Dataset) -> Result<()> {
        let expected = images.name(self.images);
        if self.images >= images.len() || line.path != expected {
            bail!(
                "line {} is of {:?}, expected {:?}: give the same images in the same order",
                self.images + 1,
                line.path,
                expected
            );
        }
        self.images += 1;
        self.novel |= line.verdict.as_deref() == Some("novel");
        self.unreadable += usize::from(line.error.as_ref().is_some_and(|e| !e.is_empty()));
        Ok(())
    }
}

fn of_json(bytes: &[u8], images: &dyn Dataset) -> Result<Done> {
    let mut done = Done::default();
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        if !line.ends_with(b"\n") {
            break;
        }
        let found = serde_json::from_slice(line);
        done.add(
            &found.context("it holds a line that is none of defend score's")?,
            images,
        )?;
        done.bytes += line.len() as u64;
    }
    Ok(done)
}

fn of_csv(bytes: &[u8], images: &dyn Dataset) -> Result<Done> {
    let mut done = Done::default();
    let mut reader = csv::Reader::from_reader(bytes);
    if !bytes.contains(&b'\n') {
        // Not even the header is whole.
        return Ok(done);
    }
    let header = reader.headers()?.clone();
    if header.get(0) != Some("path") {
        bail!("it does not begin with a header of defend score");
    }
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
        done.add(&record.deserialize(Some(&header))?, images)?;
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

    const CSV: &str = "path,score,verdict,error\na.png,1.5,normal,\n\"b, \"\"c\"\"\n.png\",,,broken\nd.png,2,novel,\n";
    const JSON: &str = "{\"path\":\"a.png\",\"verdict\":\"normal\"}\n{\"path\":\"b, \\\"c\\\"\\n.png\",\"error\":\"broken\"}\n\
        {\"path\":\"d.png\",\"verdict\":\"novel\",\"error\":null}\n";

    #[test]
    fn a_run_goes_on_behind_the_last_whole_line_wherever_it_was_cut() {
        type Read = fn(&[u8], &dyn Dataset) -> Result<Done>;
        for (text, read) in [(CSV, of_csv as Read), (JSON, of_json)] {
            let whole = read(text.as_bytes(), &images()).unwrap();
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
                let done = read(&text.as_bytes()[..cut], &images()).unwrap();
                let kept = &text[..done.bytes as usize];
                assert!(kept.is_empty() || kept.ends_with('\n'), "{cut}: {kept:?}");
                assert!(cut - kept.len() < 60, "{cut}: {kept:?}");
                // What was kept is read back alike.
                assert_eq!(read(kept.as_bytes(), &images()).unwrap(), done);
            }
        }
    }

    #[test]
    fn lines_of_other_images_are_refused() {
        for text in ["path,score\nb.png,1\n", "name,score\na.png,1\n"] {
            assert!(of_csv(text.as_bytes(), &images()).is_err(), "{text}");
        }
        let more = format!("{CSV}e.png,1,normal,\n");
        assert!(of_csv(more.as_bytes(), &images()).is_err());
        for text in ["{\"path\":\"d.png\"}\n", "no JSON\n"] {
            assert!(of_json(text.as_bytes(), &images()).is_err(), "{text}");
        }
    }
}
