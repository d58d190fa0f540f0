//! Reading the files of published data sets, which a user has to download first.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::Path;

use image::RgbImage;

use crate::{Error, read_image};

/// Opens a file; `help` says what to download when it is not there.
pub(crate) fn open_file(path: &Path, help: &'static str) -> Result<File, Error> {
    File::open(path).map_err(|source| fault(path, help, source))
}

/// Reads a text file; `help` says what to download when it is not there.
pub(crate) fn read_text(path: &Path, help: &'static str) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|source| fault(path, help, source))
}

/// Reads an image; `help` says what to download when it is not there.
pub(crate) fn read_published(path: &Path, help: &'static str) -> Result<RgbImage, Error> {
    read_image(path).map_err(|error| match error {
        Error::Read { path, source } => fault(&path, help, source),
        other => other,
    })
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
