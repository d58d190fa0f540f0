//! Folders of image files, with and without a sub-folder for each class.

use std::borrow::Cow;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use image::{GrayImage, RgbImage};
use walkdir::WalkDir;

use crate::decode::mask_of;
use crate::walk::{PassedOver, Reason, distinct, files_under, visible};
use crate::{ClassId, Dataset, Error, dataset::sample, read_image, read_image_at_least};

/// Image files without labels.
#[derive(Debug, Clone)]
pub struct ImageFolder {
    paths: Vec<PathBuf>,
    passed_over: Vec<PassedOver>,
    /// Mask of each image; none where no image has one.
    masks: Vec<Option<PathBuf>>,
}

impl ImageFolder {
    /// Finds the images in `folder` and its sub-folders, sorted by path.
    ///
    /// A file counts by its extension, in upper or lower case; other files are passed over
    /// ([`ImageFolder::passed_over`]), and so are links that lead nowhere or in a circle, folders that cannot be read and those of
    /// archives and systems. What starts with a dot is not told of. Links are followed.
    ///
    /// # Errors
    /// [`Error::Walk`] when the folder cannot be listed; [`Error::NoImages`], or [`Error::NotSupported`] for the first image in a
    /// format that is not read when there are no others.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, Error> {
        let folder = folder.as_ref();
        let (paths, passed_over) = files_under(folder)?;
        if paths.is_empty() {
            // What would help most is said first: how to convert what is there.
            let unsupported = passed_over.iter().find_map(|other| match other.reason {
                Reason::NotSupported { format, convert } => Some((other, format, convert)),
                _ => None,
            });
            if let Some((other, format, convert)) = unsupported {
                return Err(Error::NotSupported {
                    origin: other.path.display().to_string(),
                    format,
                    convert,
                });
            }
            let expected = "files that end in .jpg, .png, .webp, .bmp, .gif, .tif or .ppm";
            return Err(Error::NoImages {
                path: folder.into(),
                expected,
            });
        }
        Ok(Self {
            paths,
            passed_over,
            masks: Vec::new(),
        })
    }

    /// Takes these files as they are, whatever their extension and in this order.
    pub fn from_paths(paths: Vec<PathBuf>) -> Self {
        Self {
            paths,
            passed_over: Vec::new(),
            masks: Vec::new(),
        }
    }

    /// With masks of where the novelty is: one for each of the files, or none. A mask is as large as its image.
    ///
    /// # Errors
    /// [`Error::Config`] for another number of masks than files.
    pub fn with_masks(mut self, masks: Vec<Option<PathBuf>>) -> Result<Self, Error> {
        if masks.len() != self.paths.len() {
            return Err(Error::Config {
                field: "masks",
                value: masks.len() as f64,
                expected: "as many as files",
            });
        }
        self.masks = masks;
        Ok(self)
    }

    /// The same without files that stand in it twice, through links or under one path; how many these were. A fit would count
    /// them twice.
    #[must_use]
    pub fn distinct(self) -> (Self, usize) {
        let kept = self.distinct_positions();
        let dropped = self.paths.len() - kept.len();
        let of = |masks: &[Option<PathBuf>]| {
            let kept = kept.iter().filter_map(|&i| masks.get(i).cloned());
            kept.collect()
        };
        let once = Self {
            paths: kept.iter().map(|&i| self.paths[i].clone()).collect(),
            masks: of(&self.masks),
            passed_over: self.passed_over,
        };
        (once, dropped)
    }

    /// Positions of the files that stand in it for the first time: those that [`ImageFolder::distinct`] keeps.
    pub fn distinct_positions(&self) -> Vec<usize> {
        distinct(&self.paths)
    }

    /// The files.
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// What in the folder is no image or cannot be read, sorted by path: files, links that lead nowhere, folders.
    pub fn passed_over(&self) -> &[PassedOver] {
        &self.passed_over
    }
}

impl Dataset for ImageFolder {
    fn len(&self) -> usize {
        self.paths.len()
    }

    fn name(&self, index: usize) -> Cow<'_, str> {
        self.paths
            .get(index)
            .map_or(Cow::Borrowed(""), |path| name_of(path))
    }

    fn image(&self, index: usize) -> Result<RgbImage, Error> {
        read_image(sample(&self.paths, index)?)
    }

    fn image_at_least(&self, index: usize, least: [u32; 2]) -> Result<RgbImage, Error> {
        read_image_at_least(sample(&self.paths, index)?, least)
    }

    fn mask(&self, index: usize) -> Result<Option<GrayImage>, Error> {
        let image = sample(&self.paths, index)?;
        let Some(Some(path)) = self.masks.get(index) else {
            return Ok(None);
        };
        Ok(Some(mask_of(image, path, &read_image(path)?)?))
    }

    fn classes(&self, _index: usize) -> &[ClassId] {
        &[]
    }

    fn class_names(&self) -> &[String] {
        &[]
    }
}

/// Image files in one sub-folder for each class, as in `train/dog/1.jpg`.
#[derive(Debug, Clone)]
pub struct ClassFolder {
    images: ImageFolder,
    classes: Vec<ClassId>,
    class_names: Vec<String>,
}

impl ClassFolder {
    /// Takes the sub-folders of `folder`, sorted by name, as classes and the images in each as
    /// [`ImageFolder::open`] finds them; images that lie beside the sub-folders are passed over.
    ///
    /// A sub-folder without images keeps its class.
    /// # Errors
    /// [`Error::Walk`] when a folder cannot be listed; [`Error::NoImages`] when there is no
    /// sub-folder with an image.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, Error> {
        let folder = folder.as_ref();
        let (mut paths, mut classes, mut class_names) = (Vec::new(), Vec::new(), Vec::new());
        for entry in visible(WalkDir::new(folder).min_depth(1).max_depth(1)) {
            let entry = entry.map_err(|source| Error::Walk {
                path: folder.into(),
                source,
            })?;
            if !entry.file_type().is_dir() {
                continue;
            }
            let class = ClassId(class_names.len() as u32);
            class_names.push(entry.file_name().to_string_lossy().into_owned());
            paths.extend(files_under(entry.path())?.0);
            classes.resize(paths.len(), class);
        }
        if paths.is_empty() {
            let expected = "one sub-folder with images for each class";
            return Err(Error::NoImages {
                path: folder.into(),
                expected,
            });
        }
        Ok(Self {
            images: ImageFolder::from_paths(paths),
            classes,
            class_names,
        })
    }
}

impl Dataset for ClassFolder {
    fn len(&self) -> usize {
        self.images.len()
    }

    fn name(&self, index: usize) -> Cow<'_, str> {
        self.images.name(index)
    }

    fn image(&self, index: usize) -> Result<RgbImage, Error> {
        self.images.image(index)
    }

    fn image_at_least(&self, index: usize, least: [u32; 2]) -> Result<RgbImage, Error> {
        self.images.image_at_least(index, least)
    }

    fn classes(&self, index: usize) -> &[ClassId] {
        self.classes.get(index).map_or(&[], std::slice::from_ref)
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }
}

/// A path as text: bytes that are no UTF-8 stay apart, as `\\xFF`.
fn name_of(path: &Path) -> Cow<'_, str> {
    if let Some(name) = path.to_str() {
        return Cow::Borrowed(name);
    }
    let mut name = String::new();
    for chunk in path.as_os_str().as_encoded_bytes().utf8_chunks() {
        name.push_str(chunk.valid());
        for byte in chunk.invalid() {
            let _ = write!(name, "\\x{byte:02X}");
        }
    }
    Cow::Owned(name)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn tree(files: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in files {
            let path = folder.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        folder
    }

    #[test]
    fn finds_images_sorted_and_nothing_else() {
        let folder = tree(&[
            "b.JPG",
            "a/z.png",
            "a/b/c.Jpeg",
            "notes.txt",
            ".hidden.png",
            ".git/x.png",
        ]);
        let found = ImageFolder::open(folder.path()).unwrap();
        let names: Vec<_> = found
            .paths()
            .iter()
            .map(|p| p.strip_prefix(folder.path()).unwrap().to_str().unwrap())
            .collect();
        assert_eq!(names, ["a/b/c.Jpeg", "a/z.png", "b.JPG"]);
        assert!(found.classes(0).is_empty() && !found.is_empty());
        assert!(found.image(0).unwrap_err().to_string().contains("c.Jpeg"));
        assert!(matches!(
            found.image(3),
            Err(Error::Index { index: 3, len: 3 })
        ));
    }

    #[cfg(unix)]
    #[test]
    fn what_cannot_be_used_is_named_with_its_reason() {
        use std::os::unix::fs::symlink;
        let folder = tree(&[
            "a.png",
            "sub/b.jfif",
            "phone.HEIC",
            "new.avif",
            "Thumbs.db",
            "__MACOSX/c.png",
            ".hidden/d.png",
        ]);
        let at = |name: &str| folder.path().join(name);
        symlink(at("nowhere.png"), at("dangling.png")).unwrap();
        symlink(folder.path(), at("sub/loop")).unwrap();
        symlink(at("a.png"), at("again.png")).unwrap();
        symlink(at("x.png"), at("y.png")).unwrap();
        symlink(at("y.png"), at("x.png")).unwrap();
        fs::create_dir(at("empty")).unwrap();
        let found = ImageFolder::open(folder.path()).unwrap();
        let inside = |path: &Path| {
            path.strip_prefix(folder.path())
                .unwrap()
                .display()
                .to_string()
        };
        let names: Vec<_> = found.paths().iter().map(|p| inside(p)).collect();
        assert_eq!(names, ["a.png", "again.png", "sub/b.jfif"]);
        let others = found.passed_over().iter();
        let others: Vec<String> = others
            .map(|other| format!("{}: {}", inside(&other.path), other.reason))
            .collect();
        assert_eq!(
            others,
            [
                "Thumbs.db: no image by its name",
                "__MACOSX: a folder of the system or of an archive",
                "dangling.png: a link to something that is not there",
                "new.avif: AVIF is not supported, convert with avifdec IN.avif OUT.png",
                "phone.HEIC: HEIC is not supported, convert with heif-convert IN.heic OUT.jpg",
                "sub/loop: a link to a folder that it is in",
                "x.png: a link to a folder that it is in",
                "y.png: a link to a folder that it is in",
            ]
        );
        let (once, dropped) = found.distinct();
        assert_eq!((once.len(), dropped), (2, 1));
        let phone = tree(&["a.heic", "b.txt"]);
        let error = ImageFolder::open(phone.path()).unwrap_err().to_string();
        assert!(
            error.contains("a.heic") && error.contains("heif-convert"),
            "{error}"
        );
    }

    #[cfg(unix)]
    #[test]
    fn names_that_are_no_text_stay_apart() {
        use std::os::unix::ffi::OsStringExt;
        let path = |byte| PathBuf::from(std::ffi::OsString::from_vec(vec![b'a', byte, b'.']));
        let found = ImageFolder::from_paths(vec![path(0xFE), path(0xFF)]);
        assert_eq!([found.name(0), found.name(1)], ["a\\xFE.", "a\\xFF."]);
    }

    #[test]
    fn an_empty_or_missing_folder_is_named() {
        let folder = tree(&["notes.txt"]);
        assert!(matches!(
            ImageFolder::open(folder.path()),
            Err(Error::NoImages { .. })
        ));
        assert!(matches!(
            ClassFolder::open(folder.path()),
            Err(Error::NoImages { .. })
        ));
        let missing = folder.path().join("nowhere");
        let error = ImageFolder::open(&missing).unwrap_err();
        assert!(error.to_string().contains("nowhere"), "{error}");
        assert!(matches!(error, Error::Walk { .. }));
    }

    #[test]
    fn given_paths_are_taken_as_they_are() {
        let paths = vec![PathBuf::from("b.data"), PathBuf::from("a")];
        let found = ImageFolder::from_paths(paths.clone());
        assert_eq!(found.paths(), paths);
        assert_eq!(found.name(0), "b.data");
    }

    #[test]
    fn sub_folders_are_classes() {
        let folder = tree(&[
            "dog/2.png",
            "dog/1.png",
            "cat/1.png",
            "loose.png",
            "ape/notes.txt",
        ]);
        let found = ClassFolder::open(folder.path()).unwrap();
        assert_eq!(found.class_names(), ["ape", "cat", "dog"]);
        let classes: Vec<_> = (0..3).map(|i| found.classes(i)[0].0).collect();
        assert_eq!((found.len(), classes), (3, vec![1, 2, 2]));
        assert!(found.name(1).ends_with("1.png") && found.classes(3).is_empty());
    }
}
