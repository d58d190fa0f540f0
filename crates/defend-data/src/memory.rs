//! Images held in memory.

use std::borrow::Cow;

use image::RgbImage;

use crate::{ClassId, Dataset, Error, dataset::sample};

/// Images held in memory, as rendered scenes and tests need them.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    samples: Vec<Sample>,
    class_names: Vec<String>,
}

#[derive(Debug, Clone)]
struct Sample {
    name: String,
    image: RgbImage,
    classes: Vec<ClassId>,
}

impl Memory {
    /// An empty set of images that may show objects of `class_names`.
    pub fn new(class_names: Vec<String>) -> Self {
        Self {
            samples: Vec::new(),
            class_names,
        }
    }

    /// Adds an image and the classes of the objects it shows, in any order.
    pub fn push(&mut self, name: impl Into<String>, image: RgbImage, mut classes: Vec<ClassId>) {
        classes.sort_unstable();
        classes.dedup();
        self.samples.push(Sample {
            name: name.into(),
            image,
            classes,
        });
    }
}

impl Dataset for Memory {
    fn len(&self) -> usize {
        self.samples.len()
    }

    fn name(&self, index: usize) -> Cow<'_, str> {
        self.samples.get(index).map_or("", |s| &s.name).into()
    }

    fn image(&self, index: usize) -> Result<RgbImage, Error> {
        Ok(sample(&self.samples, index)?.image.clone())
    }

    fn classes(&self, index: usize) -> &[ClassId] {
        self.samples.get(index).map_or(&[], |s| &s.classes)
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }
}
