//! Where the images of a benchmark come from.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use defend_core::data::{
    Cifar, CifarLabels, ClassFolder, ClassId, Coco, Crowd, Dataset, Difficult, GrayImage, Idx,
    ListedPaths, Manifest, MvtecAd, ObjectBox, RgbImage, Split, Voc,
};
use serde::{Deserialize, Serialize};

use crate::Error;

/// A data set in its published layout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum DataConfig {
    /// `cifar-10-batches-bin`.
    Cifar10 {
        /// The folder.
        path: PathBuf,
    },
    /// `cifar-100-binary`, by its 100 fine or its 20 coarse classes.
    Cifar100 {
        /// The folder.
        path: PathBuf,
        /// Whether the coarse classes are used.
        #[serde(default)]
        coarse: bool,
    },
    /// MNIST's four idx files.
    Mnist {
        /// The folder.
        path: PathBuf,
    },
    /// Fashion-MNIST's four idx files.
    FashionMnist {
        /// The folder.
        path: PathBuf,
    },
    /// Pascal VOC.
    Voc {
        /// The folder of Annotations, ImageSets and JPEGImages.
        path: PathBuf,
        /// Image set to train on.
        #[serde(default = "train")]
        train: String,
        /// Image set to test on.
        #[serde(default = "val")]
        test: String,
        /// Whether difficult objects are passed over.
        #[serde(default)]
        ignore_difficult: bool,
        /// Whether classes come from the segmentation, in place of the boxes.
        #[serde(default)]
        segmentation: bool,
    },
    /// COCO's instances.
    Coco {
        /// Annotations of the training images.
        train_annotations: PathBuf,
        /// The training images.
        train_images: PathBuf,
        /// Annotations of the test images.
        test_annotations: PathBuf,
        /// The test images.
        test_images: PathBuf,
        /// Whether crowds are passed over.
        #[serde(default)]
        ignore_crowds: bool,
    },
    /// One category of MVTec AD.
    MvtecAd {
        /// The category's folder.
        path: PathBuf,
    },
    /// A sub-folder a class, in one folder to train on and another to test on.
    ClassFolders {
        /// Folder of the training classes.
        train: PathBuf,
        /// Folder of the test classes.
        test: PathBuf,
    },
    /// A CSV or JSON list of files with labels and the splits `train` and `test`.
    Manifest {
        /// The list.
        path: PathBuf,
        /// Where its images may be: `inside` the list's folder, or `anywhere`.
        #[serde(default)]
        paths: ListedPaths,
    },
}

fn train() -> String {
    "train".into()
}

fn val() -> String {
    "val".into()
}

/// The two halves of a data set.
pub(crate) struct Halves {
    pub(crate) train: Arc<dyn Dataset>,
    pub(crate) test: Arc<dyn Dataset>,
}

impl DataConfig {
    /// The same with its relative paths below `root`.
    fn below(&self, root: &Path) -> Self {
        let mut placed = self.clone();
        let paths: Vec<&mut PathBuf> = match &mut placed {
            Self::Cifar10 { path }
            | Self::Cifar100 { path, .. }
            | Self::Mnist { path }
            | Self::FashionMnist { path }
            | Self::Voc { path, .. }
            | Self::MvtecAd { path }
            | Self::Manifest { path, .. } => vec![path],
            Self::Coco {
                train_annotations,
                train_images,
                test_annotations,
                test_images,
                ..
            } => vec![
                train_annotations,
                train_images,
                test_annotations,
                test_images,
            ],
            Self::ClassFolders { train, test } => vec![train, test],
        };
        for path in paths {
            *path = root.join(&*path);
        }
        placed
    }

    /// Opens both halves, relative paths below `root`; a class has the same number in both.
    ///
    /// # Errors
    /// [`Error::Data`], which says what to download where a file is missing.
    pub(crate) fn open(&self, root: &Path) -> Result<Halves, Error> {
        let halves = self.below(root).open_each()?;
        let names = |half: &Arc<dyn Dataset>| half.class_names().to_vec();
        let (train, test) = (names(&halves.train), names(&halves.test));
        if train == test {
            return Ok(halves);
        }
        // Defects, and the abnormal images of a folder, have no images to train on: number all by the names of both.
        let all: Vec<String> = test
            .iter()
            .chain(train.iter().filter(|name| !test.contains(name)))
            .cloned()
            .collect();
        Ok(Halves {
            train: Arc::new(Renumbered::new(halves.train, &all)),
            test: Arc::new(Renumbered::new(halves.test, &all)),
        })
    }

    fn open_each(&self) -> Result<Halves, Error> {
        fn halves<D: Dataset + 'static>(
            open: impl Fn(Split) -> Result<D, defend_core::data::Error>,
        ) -> Result<Halves, Error> {
            Ok(Halves {
                train: Arc::new(open(Split::Train)?),
                test: Arc::new(open(Split::Test)?),
            })
        }
        match self {
            Self::Cifar10 { path } => halves(|split| Cifar::cifar10(path, split)),
            Self::Cifar100 { path, coarse } => {
                let labels = if *coarse {
                    CifarLabels::Coarse
                } else {
                    CifarLabels::Fine
                };
                halves(|split| Cifar::cifar100(path, split, labels))
            }
            Self::Mnist { path } => halves(|split| Idx::mnist(path, split)),
            Self::FashionMnist { path } => halves(|split| Idx::fashion_mnist(path, split)),
            Self::Voc {
                path,
                train,
                test,
                ignore_difficult,
                segmentation,
            } => {
                let difficult = if *ignore_difficult {
                    Difficult::Ignored
                } else {
                    Difficult::Counted
                };
                halves(|split| {
                    let list = match split {
                        Split::Train => train,
                        Split::Test => test,
                    };
                    if *segmentation {
                        Voc::open_segmentation(path, list)
                    } else {
                        Voc::open(path, list, difficult)
                    }
                })
            }
            Self::Coco {
                train_annotations,
                train_images,
                test_annotations,
                test_images,
                ignore_crowds,
            } => {
                let crowd = if *ignore_crowds {
                    Crowd::Ignored
                } else {
                    Crowd::Counted
                };
                halves(|split| match split {
                    Split::Train => Coco::open(train_annotations, train_images, crowd),
                    Split::Test => Coco::open(test_annotations, test_images, crowd),
                })
            }
            Self::MvtecAd { path } => halves(|split| MvtecAd::open(path, split)),
            Self::ClassFolders { train, test } => halves(|split| match split {
                Split::Train => ClassFolder::open(train),
                Split::Test => ClassFolder::open(test),
            }),
            Self::Manifest { path, paths } => halves(|split| {
                let name = match split {
                    Split::Train => "train",
                    Split::Test => "test",
                };
                Manifest::open(path, Some(name), *paths)
            }),
        }
    }
}

/// A data set whose classes have the numbers of another list of names.
struct Renumbered {
    inner: Arc<dyn Dataset>,
    classes: Vec<Vec<ClassId>>,
    boxes: Vec<Vec<ObjectBox>>,
    class_names: Vec<String>,
}

impl Renumbered {
    fn new(inner: Arc<dyn Dataset>, class_names: &[String]) -> Self {
        let place = |class: &ClassId| {
            let name = inner.class_names().get(class.0 as usize)?;
            let place = class_names.iter().position(|known| known == name)?;
            Some(ClassId(place as u32))
        };
        let classes = (0..inner.len())
            .map(|index| {
                let mut classes: Vec<ClassId> =
                    inner.classes(index).iter().filter_map(place).collect();
                classes.sort_unstable();
                classes
            })
            .collect();
        let boxed = |found: &ObjectBox| {
            let class = place(&found.class)?;
            Some(ObjectBox { class, ..*found })
        };
        let boxes = (0..inner.len())
            .map(|index| inner.boxes(index).iter().filter_map(boxed).collect())
            .collect();
        Self {
            classes,
            boxes,
            class_names: class_names.to_vec(),
            inner,
        }
    }
}

impl Dataset for Renumbered {
    fn len(&self) -> usize {
        self.inner.len()
    }

    fn name(&self, index: usize) -> Cow<'_, str> {
        self.inner.name(index)
    }

    fn image(&self, index: usize) -> Result<RgbImage, defend_core::data::Error> {
        self.inner.image(index)
    }

    fn image_at_least(
        &self,
        index: usize,
        least: [u32; 2],
    ) -> Result<RgbImage, defend_core::data::Error> {
        self.inner.image_at_least(index, least)
    }

    fn classes(&self, index: usize) -> &[ClassId] {
        self.classes.get(index).map_or(&[], Vec::as_slice)
    }

    fn boxes(&self, index: usize) -> &[ObjectBox] {
        self.boxes.get(index).map_or(&[], Vec::as_slice)
    }

    fn mask(&self, index: usize) -> Result<Option<GrayImage>, defend_core::data::Error> {
        self.inner.mask(index)
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may panic")]

    use super::*;

    #[test]
    fn a_class_has_one_number_in_both_halves() {
        let folder = tempfile::tempdir().unwrap();
        for path in [
            "train/normal/1.png",
            "test/abnormal/1.png",
            "test/normal/1.png",
        ] {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            RgbImage::new(2, 2).save(path).unwrap();
        }
        let source = DataConfig::ClassFolders {
            train: "train".into(),
            test: "test".into(),
        };
        let halves = source.open(folder.path()).unwrap();
        let normal = halves.train.class("normal").unwrap();
        assert_eq!(halves.train.class_names(), halves.test.class_names());
        assert_eq!(halves.train.classes(0), [normal]);
        assert_eq!(halves.test.classes(1), [normal]);
        assert_ne!(halves.test.classes(0), [normal]);
    }
}
