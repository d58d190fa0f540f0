//! Where the pictures of a benchmark come from.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use defend_core::data::{
    Cifar, CifarLabels, ClassFolder, Coco, Crowd, Dataset, Difficult, Idx, Manifest, MvtecAd,
    Split, Voc,
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
    /// Takes relative paths as relative to `folder`.
    pub(crate) fn relative_to(&mut self, folder: &Path) {
        let paths: Vec<&mut PathBuf> = match self {
            Self::Cifar10 { path }
            | Self::Cifar100 { path, .. }
            | Self::Mnist { path }
            | Self::FashionMnist { path }
            | Self::Voc { path, .. }
            | Self::MvtecAd { path }
            | Self::Manifest { path } => vec![path],
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
            *path = folder.join(&*path);
        }
    }

    /// Opens both halves.
    ///
    /// # Errors
    /// [`Error::Data`], which says what to download where a file is missing.
    pub(crate) fn open(&self) -> Result<Halves, Error> {
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
            Self::Manifest { path } => halves(|split| {
                let name = match split {
                    Split::Train => "train",
                    Split::Test => "test",
                };
                Manifest::open(path, Some(name))
            }),
        }
    }
}
