//! The images that a command is given.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use defend_core::data::{Dataset, Failure, ImageFolder};
use defend_core::{Maps, NoveltyDetector, Observer, Outcome, scan_each};

/// Files to work on, and where each came from.
pub(crate) struct Found {
    /// Files in the order of the arguments, those of a folder sorted by path.
    pub(crate) paths: Vec<PathBuf>,
    /// Path of each file inside the folder that was given, or its name.
    pub(crate) inside: Vec<PathBuf>,
}

/// Expands folders; a file is taken whatever its extension.
///
/// Files in the folders that are no images by their names are told on standard error, or are an error when
/// `strict`.
pub(crate) fn find(arguments: &[PathBuf], strict: bool) -> Result<Found> {
    let mut found = Found {
        paths: Vec::new(),
        inside: Vec::new(),
    };
    let mut others = Vec::new();
    for argument in arguments {
        if argument.is_dir() {
            let folder = ImageFolder::open(argument)?;
            others.extend(folder.passed_over().to_vec());
            for path in folder.paths() {
                let inside = path.strip_prefix(argument).unwrap_or(path);
                found.inside.push(inside.to_owned());
                found.paths.push(path.clone());
            }
        } else if argument.exists() {
            let name = argument.file_name().map_or(argument.as_path(), Path::new);
            found.inside.push(name.to_owned());
            found.paths.push(argument.clone());
        } else {
            bail!("{} does not exist", argument.display());
        }
    }
    if let (true, Some(first)) = (strict, others.first()) {
        bail!("{} is no image by its name (--strict)", first.display());
    }
    for other in &others {
        eprintln!("passed over {}: no image by its name", other.display());
    }
    if !others.is_empty() {
        eprintln!("{} files passed over", others.len());
    }
    Ok(found)
}

impl Found {
    /// The files as a data set.
    pub(crate) fn dataset(&self) -> Arc<dyn Dataset> {
        Arc::new(ImageFolder::from_paths(self.paths.clone()))
    }

    /// The files as a data set with the masks that lie under the same names, as `NAME_mask.png` or `NAME.png`, in a folder; an error
    /// when none does.
    pub(crate) fn with_masks(&self, folder: &Path) -> Result<Arc<dyn Dataset>> {
        let mask = |inside: &PathBuf| {
            let stem = inside.file_stem()?.to_string_lossy();
            let names = [format!("{stem}_mask.png"), format!("{stem}.png")];
            let paths = names.map(|name| folder.join(inside.with_file_name(name)));
            paths.into_iter().find(|path| path.exists())
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
        eprintln!("{found} of {} images have a mask", masks.len());
        Ok(Arc::new(
            ImageFolder::from_paths(self.paths.clone()).with_masks(masks)?,
        ))
    }
}

/// Scores every image and hands over what was found; unreadable ones are named on standard error and
/// counted at the end, or end the run when `strict`.
pub(crate) fn scan_all(
    detector: &dyn NoveltyDetector,
    dataset: &Arc<dyn Dataset>,
    maps: Maps,
    strict: bool,
    observer: &mut dyn Observer,
    on_result: &mut dyn FnMut(Outcome) -> Result<()>,
) -> Result<()> {
    let (mut unreadable, total) = (0usize, dataset.len());
    let scanned = scan_each::<anyhow::Error>(detector, dataset, maps, observer, &mut |outcome| {
        if let Err(failure) = &outcome {
            unreadable += 1;
            if strict {
                return Err(refusal(failure));
            }
        }
        on_result(outcome)
    });
    scanned?;
    count(unreadable, total)
}

/// Says how many images could not be read; an error when all of them.
pub(crate) fn count(unreadable: usize, total: usize) -> Result<()> {
    if unreadable > 0 {
        eprintln!("{unreadable} of {total} images could not be read");
    }
    if unreadable == total {
        bail!("none of the {total} images could be read");
    }
    Ok(())
}

/// The error that an unreadable image is where they are not passed over.
pub(crate) fn refusal(failure: &Failure) -> anyhow::Error {
    anyhow::anyhow!("{}: {} (--strict)", failure.name, failure.error)
}

/// Makes a folder that results go to, before any work is done for them.
pub(crate) fn make_folder(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the folder {}", folder.display()))
}

/// Fails early when a file could not be written, before hours are spent on its content.
pub(crate) fn check_writable(file: &Path) -> Result<()> {
    if file.is_dir() {
        bail!("{} is a folder, expected a file to write", file.display());
    }
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => make_folder(parent),
        _ => Ok(()),
    }
}
