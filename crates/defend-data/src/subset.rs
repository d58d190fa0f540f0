//! A choice of another data set's images.

use std::borrow::Cow;
use std::sync::Arc;

use image::{GrayImage, RgbImage};

use crate::{ClassId, Dataset, Error, ObjectBox, dataset::sample};

/// Some images of another data set, in any order that the caller gives.
#[derive(Clone)]
pub struct Subset {
    whole: Arc<dyn Dataset>,
    indices: Vec<usize>,
}

impl Subset {
    /// The images `indices` of `whole`; an index may come twice.
    ///
    /// # Errors
    /// [`Error::Index`] when `whole` has no such image.
    pub fn new(whole: Arc<dyn Dataset>, indices: Vec<usize>) -> Result<Self, Error> {
        let len = whole.len();
        match indices.iter().find(|&&index| index >= len) {
            Some(&index) => Err(Error::Index { index, len }),
            None => Ok(Self { whole, indices }),
        }
    }

    /// Positions of the images in the whole.
    pub fn indices(&self) -> &[usize] {
        &self.indices
    }
}

impl Dataset for Subset {
    fn len(&self) -> usize {
        self.indices.len()
    }

    fn name(&self, index: usize) -> Cow<'_, str> {
        self.indices
            .get(index)
            .map_or(Cow::Borrowed(""), |&i| self.whole.name(i))
    }

    fn image(&self, index: usize) -> Result<RgbImage, Error> {
        self.whole.image(*sample(&self.indices, index)?)
    }

    fn image_at_least(&self, index: usize, least: [u32; 2]) -> Result<RgbImage, Error> {
        self.whole
            .image_at_least(*sample(&self.indices, index)?, least)
    }

    fn classes(&self, index: usize) -> &[ClassId] {
        self.indices
            .get(index)
            .map_or(&[], |&i| self.whole.classes(i))
    }

    fn boxes(&self, index: usize) -> &[ObjectBox] {
        self.indices
            .get(index)
            .map_or(&[], |&i| self.whole.boxes(i))
    }

    fn mask(&self, index: usize) -> Result<Option<GrayImage>, Error> {
        self.whole.mask(*sample(&self.indices, index)?)
    }

    fn class_names(&self) -> &[String] {
        self.whole.class_names()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Memory;

    #[test]
    fn maps_every_question_to_the_whole() {
        let mut whole = Memory::new(vec!["dog".into()]);
        whole.push("a", RgbImage::new(1, 1), vec![]);
        whole.push("b", RgbImage::new(2, 1), vec![ClassId(0), ClassId(0)]);
        let whole: Arc<dyn Dataset> = Arc::new(whole);
        let subset = Subset::new(Arc::clone(&whole), vec![1]).unwrap();
        assert_eq!((subset.len(), subset.name(0).as_ref()), (1, "b"));
        assert_eq!(subset.classes(0), [ClassId(0)]);
        assert_eq!(subset.image(0).unwrap().dimensions(), (2, 1));
        assert_eq!(subset.class("dog"), Some(ClassId(0)));
        assert!(matches!(
            subset.image(1),
            Err(Error::Index { index: 1, len: 1 })
        ));
        assert_eq!(subset.mask(0).unwrap(), None);
        assert!(matches!(
            subset.mask(1),
            Err(Error::Index { index: 1, len: 1 })
        ));
        assert!(subset.classes(1).is_empty() && subset.name(1).is_empty());
        assert!(matches!(
            Subset::new(whole, vec![2]),
            Err(Error::Index { index: 2, len: 2 })
        ));
    }
}
