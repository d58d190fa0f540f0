//! What lies under a folder: images, and what is passed over and why.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};

use walkdir::{DirEntry, WalkDir};

use crate::Error;

const EXTENSIONS: [&str; 15] = [
    "jpg", "jpeg", "jpe", "jfif", "jif", "png", "webp", "bmp", "gif", "tif", "tiff", "pnm", "ppm",
    "pgm", "pbm",
];

/// Image formats that are not read, by extension, and what reads them.
const UNSUPPORTED: [(&str, &str, &str); 6] = [
    ("heic", "HEIC", "heif-convert IN.heic OUT.jpg"),
    ("heif", "HEIF", "heif-convert IN.heif OUT.jpg"),
    ("avif", "AVIF", "avifdec IN.avif OUT.png"),
    ("jxl", "JPEG XL", "djxl IN.jxl OUT.png"),
    ("jp2", "JPEG 2000", "opj_decompress -i IN.jp2 -o OUT.png"),
    ("dng", "DNG", "darktable-cli IN.dng OUT.jpg"),
];

/// Folders of archives and systems, which hold no images of the user's.
const SYSTEM_FOLDERS: [&str; 3] = ["__MACOSX", "$RECYCLE.BIN", "System Volume Information"];

/// Something under a folder that is no image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassedOver {
    /// Where it is.
    pub path: PathBuf,
    /// Why it is passed over.
    pub reason: Reason,
}

/// Why something under a folder is passed over.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// Its name has no extension of an image.
    NoImageByName,
    /// An image in a format that is not read.
    NotSupported {
        /// The format.
        format: &'static str,
        /// A command that converts it.
        convert: &'static str,
    },
    /// A link to something that is not there.
    DanglingLink,
    /// A link to a folder that it is in.
    LinkLoop,
    /// A folder of archives or systems.
    SystemFolder,
    /// It cannot be read.
    Unreadable(String),
}

impl fmt::Display for PassedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.reason)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoImageByName => write!(f, "no image by its name"),
            Self::NotSupported { format, convert } => {
                write!(f, "{format} is not supported, convert with {convert}")
            }
            Self::DanglingLink => write!(f, "a link to something that is not there"),
            Self::LinkLoop => write!(f, "a link to a folder that it is in"),
            Self::SystemFolder => write!(f, "a folder of the system or of an archive"),
            Self::Unreadable(reason) => write!(f, "cannot be read: {reason}"),
        }
    }
}

/// Entries in the order of their names without the hidden ones; the folder itself may be hidden.
pub(crate) fn visible(walk: WalkDir) -> impl Iterator<Item = walkdir::Result<DirEntry>> {
    walk.follow_links(true)
        .sort_by_file_name()
        .into_iter()
        .filter_entry(|entry| entry.depth() == 0 || !is_hidden(entry.file_name()))
}

fn is_hidden(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".")
}

/// Images below `folder` and what is passed over, both sorted by path.
pub(crate) fn files_under(folder: &Path) -> Result<(Vec<PathBuf>, Vec<PassedOver>), Error> {
    let (mut images, mut others) = (Vec::new(), Vec::new());
    let mut walk = WalkDir::new(folder)
        .follow_links(true)
        .sort_by_file_name()
        .into_iter();
    while let Some(entry) = walk.next() {
        let entry = match entry {
            Ok(entry) => entry,
            Err(fault) if fault.depth() > 0 => {
                others.extend(passed_over(&fault));
                continue;
            }
            Err(source) => {
                return Err(Error::Walk {
                    path: folder.into(),
                    source,
                });
            }
        };
        let name = entry.file_name().to_string_lossy();
        let is_folder = entry.file_type().is_dir();
        if entry.depth() > 0 && is_hidden(entry.file_name()) {
            if is_folder {
                walk.skip_current_dir();
            }
        } else if is_folder && SYSTEM_FOLDERS.contains(&&*name) {
            walk.skip_current_dir();
            others.push(PassedOver {
                path: entry.into_path(),
                reason: Reason::SystemFolder,
            });
        } else if entry.file_type().is_file() {
            match reason_of(entry.path()) {
                None => images.push(entry.into_path()),
                Some(reason) => others.push(PassedOver {
                    path: entry.into_path(),
                    reason,
                }),
            }
        }
    }
    images.sort_unstable();
    others.sort_by(|a, b| a.path.cmp(&b.path));
    Ok((images, others))
}

/// A fault below the folder; hidden entries are not told of.
fn passed_over(fault: &walkdir::Error) -> Option<PassedOver> {
    let path = fault.path()?;
    if path.file_name().is_some_and(is_hidden) {
        return None;
    }
    let is_link = path.is_symlink();
    let reason = if fault.loop_ancestor().is_some() {
        Reason::LinkLoop
    } else {
        match fault.io_error() {
            Some(error) if is_link && error.kind() == std::io::ErrorKind::NotFound => {
                Reason::DanglingLink
            }
            // Links that lead to each other.
            Some(_) if is_link && std::fs::metadata(path).is_err() => Reason::LinkLoop,
            Some(error) => Reason::Unreadable(error.to_string()),
            None => Reason::Unreadable(fault.to_string()),
        }
    };
    Some(PassedOver {
        path: path.to_owned(),
        reason,
    })
}

/// Why a file is no image by its name; `None` for one that is.
fn reason_of(path: &Path) -> Option<Reason> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
    let is = |known: &str| extension.eq_ignore_ascii_case(known);
    if EXTENSIONS.iter().any(|known| is(known)) {
        return None;
    }
    let found = UNSUPPORTED.iter().find(|(known, ..)| is(known));
    Some(
        found.map_or(Reason::NoImageByName, |&(_, format, convert)| {
            Reason::NotSupported { format, convert }
        }),
    )
}

/// Format of an image that is not read, and a command that converts it, by the content.
pub(crate) fn unsupported(bytes: &[u8]) -> Option<(&'static str, &'static str)> {
    let boxed = |kind: &[u8]| bytes.get(4..8) == Some(b"ftyp") && bytes.get(8..12) == Some(kind);
    let extension = if [&b"heic"[..], b"heix", b"hevc", b"mif1", b"msf1"]
        .into_iter()
        .any(boxed)
    {
        "heic"
    } else if boxed(b"avif") || boxed(b"avis") {
        "avif"
    } else if bytes.starts_with(&[0xFF, 0x0A]) || bytes.get(4..8) == Some(b"JXL ") {
        "jxl"
    } else if bytes.get(4..8) == Some(b"jP  ") {
        "jp2"
    } else {
        return None;
    };
    let found = UNSUPPORTED.iter().find(|(known, ..)| *known == extension);
    found.map(|&(_, format, convert)| (format, convert))
}

/// Positions of the paths that lead to a file which no earlier one leads to, through links or under the same name.
pub(crate) fn distinct(paths: &[PathBuf]) -> Vec<usize> {
    let mut seen = HashSet::with_capacity(paths.len());
    let file = |path: &PathBuf| path.canonicalize().unwrap_or_else(|_| path.clone());
    let numbered = paths.iter().enumerate();
    let first = numbered.filter(|(_, path)| seen.insert(file(path)));
    first.map(|(index, _)| index).collect()
}
