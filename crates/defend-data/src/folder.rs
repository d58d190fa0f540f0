//! Folders of image files, with and without a sub-folder for each class.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use image::{GrayImage, RgbImage};
use walkdir::{DirEntry, WalkDir};

use crate::decode::mask_of;
use crate::{ClassId, Dataset, Error, dataset::sample, read_image};

const EXTENSIONS: [&str; 13] = [
    "jpg", "jpeg", "jpe", "png", "webp", "bmp", "gif", "tif", "tiff", "pnm", "ppm", "pgm", "pbm",
];

/// Image files without labels.
#[derive(Debug, Clone)]
pub struct ImageFolder {
    paths: Vec<PathBuf>,
    passed_over: Vec<PathBuf>,
    /// Mask of each image; none where no image has one.
    masks: Vec<Option<PathBuf>>,
}

impl ImageFolder {
    /// Finds the images in `folder` and its sub-folders, sorted by path.
    ///
    /// A file counts by its extension, in upper or lower case; other files are passed over
    /// ([`ImageFolder::passed_over`]), and so are all whose name or folder starts with a dot. Links are
    /// followed.
    /// # Errors
    /// [`Error::Walk`] when the folder cannot be listed; [`Error::NoImages`].
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, Error> {
        let folder = folder.as_ref();
        let (paths, passed_over) = files_under(folder)?;
        if paths.is_empty() {
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

    /// The files.
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// Files of the folder that are no images by their extension, sorted by path.
    pub fn passed_over(&self) -> &[PathBuf] {
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
            .map_or(Cow::Borrowed(""), |path| path.to_string_lossy())
    }

    fn image(&self, index: usize) -> Result<RgbImage, Error> {
        read_image(sample(&self.paths, index)?)
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

    fn classes(&self, index: usize) -> &[ClassId] {
        self.classes.get(index).map_or(&[], std::slice::from_ref)
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }
}

/// Entries in the order of their names without the hidden ones; the folder itself may be hidden.
fn visible(walk: WalkDir) -> impl Iterator<Item = walkdir::Result<DirEntry>> {
    walk.follow_links(true)
        .sort_by_file_name()
        .into_iter()
        .filter_entry(|entry| {
            entry.depth() == 0 || !entry.file_name().as_encoded_bytes().starts_with(b".")
        })
}

/// Images and other files below `folder`, both sorted by path.
fn files_under(folder: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>), Error> {
    let (mut images, mut others) = (Vec::new(), Vec::new());
    for entry in visible(WalkDir::new(folder)) {
        let entry = entry.map_err(|source| Error::Walk {
            path: folder.into(),
            source,
        })?;
        if !entry.file_type().is_file() {
            continue;
        }
        let files = if has_image_extension(entry.path()) {
            &mut images
        } else {
            &mut others
        };
        files.push(entry.into_path());
    }
    images.sort_unstable();
    others.sort_unstable();
    Ok((images, others))
}

fn has_image_extension(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str());
    extension.is_some_and(|e| EXTENSIONS.iter().any(|known| e.eq_ignore_ascii_case(known)))
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
