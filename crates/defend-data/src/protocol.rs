//! Which images are normal: the protocols of the paper's tables.

use serde::{Deserialize, Serialize};

use crate::{ClassId, Dataset};

/// The truth about one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Label {
    /// Like the training images; negative.
    Normal,
    /// Novel; positive.
    Abnormal,
}

impl Label {
    /// Whether the image is novel.
    pub fn is_abnormal(self) -> bool {
        self == Self::Abnormal
    }
}

/// A rule that tells normal from abnormal images by the objects they show.
///
/// ```
/// use defend_data::{ClassId, Label, Protocol};
///
/// /// Normal is what shows nothing but one class.
/// struct Alone(ClassId);
///
/// impl Protocol for Alone {
///     fn label(&self, classes: &[ClassId]) -> Label {
///         if classes == [self.0] { Label::Normal } else { Label::Abnormal }
///     }
/// }
///
/// assert_eq!(Alone(ClassId(2)).label(&[ClassId(2)]), Label::Normal);
/// assert_eq!(Alone(ClassId(2)).label(&[ClassId(1), ClassId(2)]), Label::Abnormal);
/// ```
pub trait Protocol {
    /// The truth about an image that shows objects of `classes`.
    fn label(&self, classes: &[ClassId]) -> Label;

    /// Positions of the images to train on, ascending: the normal ones.
    fn train(&self, dataset: &dyn Dataset) -> Vec<usize> {
        (0..dataset.len())
            .filter(|&index| self.label(dataset.classes(index)) == Label::Normal)
            .collect()
    }
}

/// An image is normal when it shows an object of a normal class, whatever else it shows.
///
/// With images of one object this is one-vs-all (one normal class, Table 4) and half-vs-half
/// (Table 5); with several it is the paper's multi-object protocol. An image without labels is
/// abnormal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MultiObject {
    /// The normal classes.
    pub normal: Vec<ClassId>,
}

/// An image is abnormal when it shows an object of one class; all others are normal (Table 2).
///
/// An image without labels is normal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AllVsOne {
    /// The abnormal class.
    pub abnormal: ClassId,
}

impl Protocol for MultiObject {
    fn label(&self, classes: &[ClassId]) -> Label {
        let normal = classes.iter().any(|class| self.normal.contains(class));
        if normal {
            Label::Normal
        } else {
            Label::Abnormal
        }
    }
}

impl Protocol for AllVsOne {
    fn label(&self, classes: &[ClassId]) -> Label {
        if classes.contains(&self.abnormal) {
            Label::Abnormal
        } else {
            Label::Normal
        }
    }
}

#[cfg(test)]
mod tests {
    use image::RgbImage;

    use super::*;
    use crate::Memory;

    fn scenes() -> Memory {
        let mut scenes = Memory::default();
        for classes in [vec![0], vec![0, 1], vec![1], vec![2], vec![]] {
            let classes = classes.into_iter().map(ClassId).collect();
            scenes.push("scene", RgbImage::new(1, 1), classes);
        }
        scenes
    }

    #[test]
    fn one_normal_object_makes_a_normal_image() {
        let one = MultiObject {
            normal: vec![ClassId(0)],
        };
        assert_eq!(one.train(&scenes()), [0, 1]);
        let half = MultiObject {
            normal: vec![ClassId(0), ClassId(2)],
        };
        assert_eq!(half.train(&scenes()), [0, 1, 3]);
        assert!(one.label(&[ClassId(1), ClassId(2)]).is_abnormal());
        assert!(one.label(&[]).is_abnormal());
    }

    #[test]
    fn one_abnormal_object_makes_an_abnormal_image() {
        let protocols: [Box<dyn Protocol>; 1] = [Box::new(AllVsOne {
            abnormal: ClassId(1),
        })];
        assert_eq!(protocols[0].train(&scenes()), [0, 3, 4]);
    }
}
