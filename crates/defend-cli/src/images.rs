//! The images that a command is given.

use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use defend_core::data::{Dataset, Error, Failure, ImageFolder, Reason, find_mask};
use defend_core::{Maps, NoveltyDetector, Observer, Outcome, scan_each};

use crate::say::say;

/// Files to work on, and where each came from.
pub(crate) struct Found {
    /// Files in the order of the arguments, those of a folder sorted by path.
    pub(crate) paths: Vec<PathBuf>,
    /// Path of each file inside the folder that was given, or its name.
    pub(crate) inside: Vec<PathBuf>,
}

/// Expands folders; a file is taken whatever its extension, and `-` stands for paths on standard input, a line each.
///
/// What is passed over in the folders is told on standard error, or is an error when `strict`. `except`: a folder inside them that is not
/// looked into.
pub(crate) fn find(arguments: &[PathBuf], strict: bool, except: Option<&Path>) -> Result<Found> {
    let mut found = Found {
        paths: Vec::new(),
        inside: Vec::new(),
    };
    let mut others = Vec::new();
    let except = except.and_then(|folder| folder.canonicalize().ok());
    // A folder that is itself in there was asked for by name.
    let asked_for = |except: &PathBuf| {
        let inside = |path: &PathBuf| path.canonicalize().is_ok_and(|p| p.starts_with(except));
        arguments.iter().any(inside)
    };
    let except = except.filter(|except| !asked_for(except));
    let left_out = |path: &Path| {
        let whole = except.as_ref().and_then(|_| path.canonicalize().ok());
        matches!((&except, whole), (Some(except), Some(whole)) if whole.starts_with(except))
    };
    let mut empty = None;
    for argument in expanded(arguments)? {
        if argument.is_dir() {
            let folder = match ImageFolder::open(&argument) {
                Ok(folder) => folder,
                Err(error @ (Error::NoImages { .. } | Error::NotSupported { .. })) if !strict => {
                    say!("passed over {}: it holds no image", argument.display());
                    empty = Some(error);
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let passed_over = folder.passed_over().iter();
            others.extend(passed_over.filter(|o| !left_out(&o.path)).cloned());
            for path in folder.paths().iter().filter(|path| !left_out(path)) {
                let inside = path.strip_prefix(&argument).unwrap_or(path);
                found.inside.push(inside.to_owned());
                found.paths.push(path.clone());
            }
        } else if argument.exists() {
            let name = argument.file_name().map_or(argument.as_path(), Path::new);
            found.inside.push(name.to_owned());
            found.paths.push(argument);
        } else {
            bail!("{} does not exist", argument.display());
        }
    }
    if let (true, Some(error)) = (found.paths.is_empty(), empty) {
        return Err(error.into());
    }
    let mut faults = others.iter().filter(|other| is_fault(&other.reason));
    if let (true, Some(first)) = (strict, faults.next()) {
        bail!("{first} (--strict)");
    }
    for other in &others {
        say!("passed over {other}");
        if matches!(other.reason, Reason::Unreadable(_)) {
            UNREADABLE_FOLDER.store(true, Ordering::Relaxed);
        }
    }
    if !others.is_empty() {
        say!("{} passed over", others.len());
    }
    if found.paths.is_empty() && !arguments.is_empty() {
        bail!("there are no images to look at");
    }
    Ok(found)
}

/// Whether a folder could not be read.
static UNREADABLE_FOLDER: AtomicBool = AtomicBool::new(false);

/// Whether [`find`] met a folder that could not be read: nobody knows what is in it.
pub(crate) fn met_unreadable_folder() -> bool {
    UNREADABLE_FOLDER.load(Ordering::Relaxed)
}

/// Whether it may be an image that was meant to be looked at.
fn is_fault(reason: &Reason) -> bool {
    !matches!(reason, Reason::NoImageByName | Reason::SystemFolder)
}

/// The arguments, with paths from standard input in the place of `-`.
fn expanded(arguments: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::with_capacity(arguments.len());
    for argument in arguments {
        if argument.as_os_str() != "-" {
            paths.push(argument.clone());
            continue;
        }
        for line in std::io::stdin().lock().split(b'\n') {
            let mut line = line.context("cannot read paths from standard input")?;
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            if !line.is_empty() {
                paths.push(path_of(line)?);
            }
        }
    }
    Ok(paths)
}

#[cfg(unix)]
#[expect(clippy::unnecessary_wraps, reason = "not every path is text elsewhere")]
fn path_of(bytes: Vec<u8>) -> Result<PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    Ok(std::ffi::OsString::from_vec(bytes).into())
}

#[cfg(not(unix))]
fn path_of(bytes: Vec<u8>) -> Result<PathBuf> {
    let text = String::from_utf8(bytes).context("a path on standard input is no UTF-8")?;
    Ok(text.into())
}

impl Found {
    /// Each file once, whatever leads to it: what is learnt from counts once. Says how many were there again.
    pub(crate) fn distinct(self) -> Self {
        let first = ImageFolder::from_paths(self.paths.clone()).distinct_positions();
        let again = self.paths.len() - first.len();
        if again > 0 {
            say!("{again} images were given twice, through links or folders: each counts once");
        }
        self.at(&first)
    }

    /// The files at these positions.
    pub(crate) fn at(&self, positions: &[usize]) -> Self {
        let of = |paths: &[PathBuf]| {
            let chosen = positions.iter().filter_map(|&i| paths.get(i).cloned());
            chosen.collect()
        };
        Self {
            paths: of(&self.paths),
            inside: of(&self.inside),
        }
    }

    /// The files as a data set.
    pub(crate) fn dataset(&self) -> Arc<dyn Dataset> {
        Arc::new(ImageFolder::from_paths(self.paths.clone()))
    }

    /// The files as a data set with the masks that lie under the same names, as `NAME_mask.png` or `NAME.png` (or BMP or TIFF), in a
    /// folder; an error when none does.
    pub(crate) fn with_masks(&self, folder: &Path) -> Result<Arc<dyn Dataset>> {
        let mask = |inside: &PathBuf| {
            let stem = inside.file_stem()?.to_string_lossy();
            find_mask(&folder.join(inside.parent()?), &stem)
        };
        let masks: Vec<Option<PathBuf>> = self.inside.iter().map(mask).collect();
        let same =
            |path: &PathBuf, mask: &PathBuf| path.canonicalize().ok() == mask.canonicalize().ok();
        let pairs = self.paths.iter().zip(&masks);
        for (path, mask) in pairs.filter_map(|(path, mask)| Some((path, mask.as_ref()?))) {
            if same(path, mask) {
                bail!("{} cannot be its own mask", path.display());
            }
        }
        let found = masks.iter().flatten().count();
        if found == 0 {
            bail!(
                "{} holds no mask: expected NAME_mask.png or NAME.png for an image NAME",
                folder.display()
            );
        }
        say!("{found} of {} images have a mask", masks.len());
        Ok(Arc::new(
            ImageFolder::from_paths(self.paths.clone()).with_masks(masks)?,
        ))
    }
}

/// Scores every image and hands over what was found; unreadable ones are named on standard error and counted. Ends the run when there are
/// more of them than `most`.
pub(crate) fn scan_all(
    detector: &dyn NoveltyDetector,
    dataset: &Arc<dyn Dataset>,
    maps: Maps,
    most: usize,
    observer: &mut dyn Observer,
    on_result: &mut dyn FnMut(Outcome) -> Result<()>,
) -> Result<usize> {
    let unreadable = Unreadable::of(dataset.len(), most);
    scan_rest(detector, dataset, maps, unreadable, observer, on_result)
}

/// As [`scan_all`], of the images behind those that `unreadable` has counted.
pub(crate) fn scan_rest(
    detector: &dyn NoveltyDetector,
    dataset: &Arc<dyn Dataset>,
    maps: Maps,
    mut unreadable: Unreadable,
    observer: &mut dyn Observer,
    on_result: &mut dyn FnMut(Outcome) -> Result<()>,
) -> Result<usize> {
    scan_each::<anyhow::Error>(detector, dataset, maps, observer, &mut |outcome| {
        if let Err(failure) = &outcome {
            unreadable.count(failure)?;
        }
        on_result(outcome)
    })?;
    unreadable.finish()
}

/// Counts what could not be read.
pub(crate) struct Unreadable {
    found: usize,
    total: usize,
    most: usize,
}

impl Unreadable {
    /// `found` of `total` are known to be unreadable.
    pub(crate) fn after(found: usize, total: usize, most: usize) -> Self {
        Self {
            found,
            ..Self::of(total, most)
        }
    }

    pub(crate) fn of(total: usize, most: usize) -> Self {
        Self {
            found: 0,
            total,
            most,
        }
    }

    /// One more, or the error that it is one too many.
    pub(crate) fn count(&mut self, failure: &Failure) -> Result<()> {
        self.found += 1;
        if self.found <= self.most {
            return Ok(());
        }
        if self.most == 0 {
            bail!("{}: {} (--strict)", failure.name, failure.error);
        }
        bail!(
            "more than {} images cannot be read (--max-unreadable), the last is {}: {}",
            self.most,
            failure.name,
            failure.error
        )
    }

    /// Says how many there were; an error when none of several could be read.
    pub(crate) fn finish(self) -> Result<usize> {
        let Self { found, total, .. } = self;
        if found > 0 {
            say!("{found} of {total} images could not be read");
        }
        if total > 1 && found == total {
            bail!("none of the {total} images could be read");
        }
        Ok(found)
    }
}

/// Makes a folder that results go to, before any work is done for them.
pub(crate) fn make_folder(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the folder {}", folder.display()))
}

/// Fails early when a file could not be written, before hours are spent on its content, or when it would replace one of `inputs`.
///
/// A link is followed, so that what it leads to is written; devices and folders are refused.
pub(crate) fn check_writable(file: &Path, inputs: &[PathBuf]) -> Result<PathBuf> {
    let target = file.canonicalize().unwrap_or_else(|_| file.to_owned());
    if inputs
        .iter()
        .any(|input| input.canonicalize().is_ok_and(|input| input == target))
    {
        bail!(
            "{} is one of the files that are read: write to another file",
            file.display()
        );
    }
    if let Ok(found) = std::fs::metadata(&target) {
        if found.is_dir() {
            bail!("{} is a folder, expected a file to write", file.display());
        }
        if !found.is_file() {
            bail!("{} is a device, expected a file to write", file.display());
        }
        std::fs::OpenOptions::new()
            .append(true)
            .open(&target)
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    let folder = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    make_folder(folder)?;
    // The file is written beside its place and then moved there.
    let probe = folder.join(format!(".defend-{}", std::process::id()));
    std::fs::write(&probe, b"")
        .and_then(|()| std::fs::remove_file(&probe))
        .with_context(|| format!("cannot write into {}", folder.display()))?;
    Ok(target)
}
