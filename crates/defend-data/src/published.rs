//! Reading the files of published data sets, which a user has to download first.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Component, Path, PathBuf};

use image::RgbImage;

use crate::{Error, read_image, read_image_at_least};

/// Opens a file; `help` says what to download when it is not there.
pub(crate) fn open_file(path: &Path, help: &'static str) -> Result<File, Error> {
    File::open(path).map_err(|source| fault(path, help, source))
}

/// Reads a file; `help` says what to download when it is not there.
pub(crate) fn read_bytes(path: &Path, help: &'static str) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|source| fault(path, help, source))
}

/// Refuses a list of images of which some are not there: how many, and the first five.
pub(crate) fn expect_images<'a>(
    list: &Path,
    images: impl ExactSizeIterator<Item = &'a Path>,
) -> Result<(), Error> {
    let (total, mut missing, mut first) = (images.len(), 0, Vec::new());
    for image in images.filter(|image| !image.exists()) {
        missing += 1;
        if first.len() < 5 {
            first.push(image.to_owned());
        }
    }
    if missing == 0 {
        return Ok(());
    }
    Err(Error::MissingImages {
        list: list.into(),
        missing,
        total,
        first,
    })
}

/// The file in `folder` that a list calls `name`: with slashes of either kind, and with more or fewer folders before it than
/// there are. Never outside of `folder`.
pub(crate) fn listed_image(folder: &Path, name: &str) -> PathBuf {
    let slashes = name.replace('\\', "/");
    let parts: Vec<&std::ffi::OsStr> = Path::new(&slashes)
        .components()
        .filter_map(|part| match part {
            Component::Normal(part) => Some(part),
            _ => None,
        })
        .collect();
    let below = |skip: usize| folder.join(parts[skip..].iter().collect::<PathBuf>());
    (0..parts.len())
        .map(below)
        .find(|path| path.is_file())
        .unwrap_or_else(|| below(0))
}

/// Whether a path stays in the folder that it is relative to, by its text: links are followed.
pub(crate) fn is_inside(path: &Path) -> bool {
    let text = path.to_string_lossy().replace('\\', "/");
    // A drive of Windows is no folder anywhere.
    let drive = text.as_bytes().get(1) == Some(&b':');
    let mut depth = 0i64;
    !drive
        && Path::new(&text).components().all(|part| {
            depth += match part {
                Component::Normal(_) => 1,
                Component::ParentDir => -1,
                Component::CurDir => 0,
                Component::RootDir | Component::Prefix(_) => return false,
            };
            depth >= 0
        })
}

/// Reads a text file; `help` says what to download when it is not there.
pub(crate) fn read_text(path: &Path, help: &'static str) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|source| fault(path, help, source))
}

/// Reads an image; `help` says what to download when it is not there.
pub(crate) fn read_published(path: &Path, help: &'static str) -> Result<RgbImage, Error> {
    named(read_image(path), help)
}

fn named(image: Result<RgbImage, Error>, help: &'static str) -> Result<RgbImage, Error> {
    image.map_err(|error| match error {
        Error::Read { path, source } => fault(&path, help, source),
        other => other,
    })
}

/// As [`read_published`], possibly reduced: see [`crate::decode_image_at_least`].
pub(crate) fn read_published_at_least(
    path: &Path,
    least: [u32; 2],
    help: &'static str,
) -> Result<RgbImage, Error> {
    named(read_image_at_least(path, least), help)
}

/// Sees to it that a folder is there.
pub(crate) fn expect_folder(path: &Path, help: &'static str) -> Result<(), Error> {
    if path.is_dir() {
        Ok(())
    } else {
        Err(Error::Missing {
            path: path.into(),
            help,
        })
    }
}

fn fault(path: &Path, help: &'static str, source: io::Error) -> Error {
    let path = path.into();
    match source.kind() {
        ErrorKind::NotFound => Error::Missing { path, help },
        _ => Error::Read { path, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_lists_are_found_below_their_folder() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("images");
        for file in ["images/1.jpg", "images/sub/2.jpg", "3.jpg"] {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        for (name, found) in [
            ("1.jpg", "1.jpg"),
            ("images/1.jpg", "1.jpg"),
            ("images\\1.jpg", "1.jpg"),
            ("C:\\data\\images\\sub\\2.jpg", "sub/2.jpg"),
            ("/elsewhere/sub/2.jpg", "sub/2.jpg"),
            ("sub/2.jpg", "sub/2.jpg"),
            // Not there, and never outside.
            ("../3.jpg", "3.jpg"),
            ("a/4.jpg", "a/4.jpg"),
            ("", ""),
        ] {
            assert_eq!(listed_image(&folder, name), folder.join(found), "{name}");
        }
    }

    #[test]
    fn absent_images_are_counted_and_five_are_named() {
        let names: Vec<PathBuf> = (0..7).map(|i| format!("/nowhere/{i}.jpg").into()).collect();
        let mut images: Vec<&Path> = names.iter().map(PathBuf::as_path).collect();
        images.push(Path::new("/"));
        let error = expect_images(Path::new("list.json"), images.into_iter()).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("7 of the 8 images of \"list.json\""),
            "{text}"
        );
        assert!(
            text.contains("/nowhere/4.jpg, ...") && !text.contains("5.jpg"),
            "{text}"
        );
    }
}
