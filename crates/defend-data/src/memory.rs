//! Images held in memory.

use std::borrow::Cow;

use image::RgbImage;

use crate::{ClassId, Dataset, Error, ObjectBox, dataset::sample};

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
    boxes: Vec<ObjectBox>,
}

impl Sample {
    fn new(name: String, image: RgbImage, mut classes: Vec<ClassId>) -> Self {
        classes.sort_unstable();
        classes.dedup();
        Self {
            name,
            image,
            classes,
            boxes: Vec::new(),
        }
    }
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
    pub fn push(&mut self, name: impl Into<String>, image: RgbImage, classes: Vec<ClassId>) {
        self.samples.push(Sample::new(name.into(), image, classes));
    }

    /// Adds an image and a box around each of the objects it shows.
    pub fn push_with_boxes(
        &mut self,
        name: impl Into<String>,
        image: RgbImage,
        boxes: Vec<ObjectBox>,
    ) {
        let classes = boxes.iter().map(|found| found.class).collect();
        let sample = Sample::new(name.into(), image, classes);
        self.samples.push(Sample { boxes, ..sample });
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

    fn boxes(&self, index: usize) -> &[ObjectBox] {
        self.samples.get(index).map_or(&[], |s| &s.boxes)
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }
}
