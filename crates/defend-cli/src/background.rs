//! `defend background`

use anyhow::Result;
use defend_core::BackgroundSource;
use std::path::{Path, PathBuf};

use crate::arguments::Background;
use crate::exit::Exit;
use crate::images::{check_writable, find};
use crate::progress::Progress;
use crate::say::say;

pub(crate) fn run(arguments: &Background) -> Result<Exit> {
    let photos = find(&arguments.images, arguments.look.common.strict, None)?.distinct();
    let out = check_writable(&arguments.out, &photos.paths)?;
    let photos = photos.dataset();
    let source = named(&arguments.images);
    let builder = arguments.look.builder()?;
    let background = builder.look_at_background(photos, source, &mut Progress::new())?;
    background.save(&out)?;
    say!(
        "wrote {}: {} photos by {}",
        arguments.out.display(),
        background.photos(),
        background.teacher()
    );
    Ok(Exit::default())
}

/// The background that `--background` names.
pub(crate) fn source(path: &Path, strict: bool) -> Result<BackgroundSource> {
    if !path.is_dir() {
        return Ok(defend_core::Background::load(path)?.into());
    }
    let folder = path.to_owned();
    let photos = find(std::slice::from_ref(&folder), strict, None)?
        .distinct()
        .dataset();
    Ok(BackgroundSource::Photos(photos, named(&[folder])))
}

/// Last parts of the folders' names: what lies above them is nobody's business.
fn named(folders: &[PathBuf]) -> String {
    let names = folders.iter().filter_map(|folder| folder.file_name());
    let names: Vec<_> = names.map(|name| name.to_string_lossy()).collect();
    names.join(", ")
}
