//! The data sets of the ablation and evenly spread parts of them.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;
use defend_core::data::{ClassFolder, ClassId, Dataset, Difficult, Idx, Split, Voc};

/// Where the images are; exactly one.
#[derive(Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Set {
    /// VOC folder with Annotations, ImageSets and JPEGImages; trains on `train`, tests on `val`.
    #[arg(long)]
    voc: Option<PathBuf>,
    /// Folder of Fashion-MNIST's idx files.
    #[arg(long)]
    fashion_mnist: Option<PathBuf>,
    /// Folder with `train` and `test`, a folder a class in each (CIFAR-10 as images).
    #[arg(long)]
    folders: Option<PathBuf>,
}

/// A data set with named classes.
pub(crate) type Images = Arc<dyn Dataset>;

impl Set {
    /// Training and test images.
    pub(crate) fn open(&self) -> Result<(Images, Images)> {
        if let Some(root) = &self.voc {
            let open = |split| Voc::open(root, split, Difficult::Counted);
            return Ok((Arc::new(open("train")?), Arc::new(open("val")?)));
        }
        if let Some(root) = &self.fashion_mnist {
            let open = |split| Idx::fashion_mnist(root, split);
            return Ok((Arc::new(open(Split::Train)?), Arc::new(open(Split::Test)?)));
        }
        let root = self.folders.as_ref().context("no data set is given")?;
        let open = |split| ClassFolder::open(root.join(split));
        Ok((Arc::new(open("train")?), Arc::new(open("test")?)))
    }
}

/// The class of a name.
pub(crate) fn class_id(set: &dyn Dataset, name: &str) -> Result<ClassId> {
    set.class(name).with_context(|| {
        format!(
            "no class \"{name}\", expected one of {:?}",
            set.class_names()
        )
    })
}

/// `count` of the indices at even distances.
pub(crate) fn spread(indices: &[usize], count: usize) -> Vec<usize> {
    let all = indices.len();
    let count = count.min(all);
    (0..count)
        .filter_map(|i| indices.get(i * all / count.max(1)).copied())
        .collect()
}
