//! `defend sort`

use std::io::stdout;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use defend_core::{Place, SortedFinding, sort};
use serde::Serialize;

use crate::arguments::Sort;
use crate::exit::Exit;
use crate::images::{Found, find, make_folder};
use crate::progress::Progress;
use crate::say::say;
use crate::table::{Table, escaped};

pub(crate) fn run(arguments: &Sort) -> Result<Exit> {
    let detector = arguments.common.load(&arguments.model)?;
    let found = find(
        &arguments.paths,
        arguments.common.strict,
        arguments.into.as_deref(),
    )?;
    if arguments.into.is_some() && detector.calibration().is_none() {
        bail!("the model has no threshold, so nothing is normal or novel: see defend calibrate");
    }
    if let Some(folder) = &arguments.into {
        for place in [Place::Normal, Place::Novel, Place::Unsure] {
            make_folder(&folder.join(word(place)))?;
        }
    }
    let mut bar = Progress::new();
    let sorted = sort(
        &detector,
        found.dataset(),
        arguments.expect_abnormal,
        &mut bar,
    )?;
    arguments.common.check_unreadable(&sorted.skipped)?;
    let mut table = Table::new(arguments.format, stdout().lock());
    for finding in &sorted.findings {
        let row = Row::new(finding);
        let place = row.place.map_or("-", word);
        let text = format!("{}\t{place}\t{}", row.score, escaped(row.path));
        table.row(&text, &row)?;
        if let (Some(folder), Some(place)) = (&arguments.into, finding.place) {
            put(
                &found,
                finding.alone.index,
                &folder.join(word(place)),
                arguments.link,
            )?;
        }
    }
    let percent = |share: f64| 100.0 * share;
    let share = sorted.abnormal;
    say!(
        "{} images, {} could not be read; about {:.0} % are abnormal (95 % interval {:.0} to {:.0})",
        sorted.findings.len(),
        sorted.skipped.len(),
        percent(share.estimate),
        percent(share.low),
        percent(share.high)
    );
    if sorted.weight > 0.0 {
        say!("compared with each other, weight {:.2}", sorted.weight);
    } else {
        say!(
            "not compared with each other, since so few may be chance: these are the scores of each alone"
        );
    }
    Ok(Exit {
        novel: sorted
            .findings
            .iter()
            .any(|f| f.place == Some(Place::Novel)),
        unreadable: !sorted.skipped.is_empty(),
    })
}

/// Copies or links an image into a folder, under its path inside the folder that was given.
fn put(found: &Found, index: usize, folder: &Path, link: bool) -> Result<()> {
    let (path, inside) = (found.paths.get(index), found.inside.get(index));
    let (path, inside) = path.zip(inside).context("a finding without an image")?;
    let target = free(&folder.join(inside));
    if let Some(parent) = target.parent() {
        make_folder(parent)?;
    }
    let whole = path.canonicalize();
    let whole = whole.with_context(|| format!("cannot find {}", path.display()))?;
    let done = if link {
        link_to(&whole, &target)
    } else {
        std::fs::copy(&whole, &target).map(drop)
    };
    done.with_context(|| format!("cannot write {}", target.display()))
}

/// The path, or one with a number where something is there already.
fn free(path: &Path) -> PathBuf {
    let mut target = path.to_owned();
    let mut number = 1;
    while target.symlink_metadata().is_ok() {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let extension = path
            .extension()
            .map(|e| format!(".{}", e.to_string_lossy()));
        target = path.with_file_name(format!("{stem}-{number}{}", extension.unwrap_or_default()));
        number += 1;
    }
    target
}

#[cfg(unix)]
fn link_to(original: &Path, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(original, link)
}

#[cfg(not(unix))]
fn link_to(original: &Path, link: &Path) -> std::io::Result<()> {
    std::fs::hard_link(original, link)
}

#[derive(Serialize)]
struct Row<'a> {
    path: &'a str,
    /// Together with the others.
    score: f64,
    place: Option<Place>,
    alone: f64,
    p_value: f64,
}

impl<'a> Row<'a> {
    fn new(finding: &'a SortedFinding) -> Self {
        Self {
            path: &finding.alone.name,
            score: finding.score,
            place: finding.place,
            alone: finding.alone.novelty.score,
            p_value: finding.p_value,
        }
    }
}

fn word(place: Place) -> &'static str {
    match place {
        Place::Normal => "normal",
        Place::Novel => "novel",
        Place::Unsure => "unsure",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_taken_gets_a_number() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.b.jpg");
        assert_eq!(free(&path), path);
        std::fs::write(&path, "").unwrap();
        assert_eq!(free(&path), folder.path().join("a.b-1.jpg"));
        std::fs::write(folder.path().join("a.b-1.jpg"), "").unwrap();
        assert_eq!(free(&path), folder.path().join("a.b-2.jpg"));
    }
}
