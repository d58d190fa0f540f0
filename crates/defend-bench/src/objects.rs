//! Figures over objects, for data sets that say where these are.

use defend_core::PatchMap;
use defend_core::data::{ClassId, Dataset, ObjectBox};
use defend_core::metrics::auroc;
use ndarray::Array1;

use crate::Error;

/// How well maps tell patches of other objects from patches of normal ones.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ObjectFigures {
    /// Over the patches of all images.
    pub(crate) pooled: f64,
    /// Mean over the images that show both.
    pub(crate) within: f64,
}

/// Over all test images; `None` where the method has no maps or no image shows both a normal object and another one.
///
/// A patch belongs to a box that holds its centre. Those in boxes of both kinds, and those in none, do not count.
pub(crate) fn object_figures(
    set: &dyn Dataset,
    indices: &[usize],
    normal: &dyn Fn(ClassId) -> bool,
    maps: &[Option<&PatchMap>],
) -> Result<Option<ObjectFigures>, Error> {
    let mut all = Patches::default();
    let mut within = Vec::new();
    for (&index, map) in indices.iter().zip(maps) {
        let Some(map) = map else {
            return Ok(None);
        };
        let patches = Patches::new(map, set.boxes(index), normal);
        if patches.of_both_kinds() {
            within.push(patches.auroc()?);
        }
        all.scores.extend(patches.scores);
        all.other.extend(patches.other);
    }
    if within.is_empty() {
        return Ok(None);
    }
    Ok(Some(ObjectFigures {
        pooled: all.auroc()?,
        within: within.iter().sum::<f64>() / within.len() as f64,
    }))
}

/// Patches in boxes of one kind.
#[derive(Default)]
struct Patches {
    scores: Vec<f64>,
    /// Whether each is in a box of another class than the normal ones.
    other: Vec<bool>,
}

impl Patches {
    fn new(map: &PatchMap, boxes: &[ObjectBox], normal: &dyn Fn(ClassId) -> bool) -> Self {
        let mut found = Self::default();
        for (patch, value) in map.values.iter().enumerate() {
            let columns = map.grid.columns.max(1);
            let centre = |at: usize, of: usize| (at as f32 + 0.5) / of as f32;
            let (x, y) = (
                centre(patch % columns, columns),
                centre(patch / columns, map.grid.rows),
            );
            let held = boxes.iter().filter(|object| object.contains(x, y));
            let mut kinds: Vec<bool> = held.map(|object| !normal(object.class)).collect();
            kinds.sort_unstable();
            kinds.dedup();
            if let [other] = kinds[..] {
                found.scores.push(f64::from(*value));
                found.other.push(other);
            }
        }
        found
    }

    fn of_both_kinds(&self) -> bool {
        self.other.contains(&true) && self.other.contains(&false)
    }

    fn auroc(&self) -> Result<f64, Error> {
        let (scores, other) = (
            Array1::from(self.scores.clone()),
            Array1::from(self.other.clone()),
        );
        Ok(auroc(scores.view(), other.view())?)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may panic")]

    use std::borrow::Cow;

    use defend_core::data::{Error as DataError, RgbImage};
    use defend_core::vit::Grid;

    use super::*;

    /// Two images: a dog left and a cat right, whose boxes overlap in the middle column; a dog alone.
    struct Boxed;

    impl Dataset for Boxed {
        fn len(&self) -> usize {
            2
        }

        fn name(&self, _: usize) -> Cow<'_, str> {
            "".into()
        }

        fn image(&self, _: usize) -> Result<RgbImage, DataError> {
            Ok(RgbImage::new(3, 1))
        }

        fn classes(&self, _: usize) -> &[ClassId] {
            &[]
        }

        fn class_names(&self) -> &[String] {
            &[]
        }

        fn boxes(&self, index: usize) -> &[ObjectBox] {
            const fn boxed(class: u32, left: f32, right: f32) -> ObjectBox {
                ObjectBox {
                    class: ClassId(class),
                    left,
                    top: 0.0,
                    right,
                    bottom: 1.0,
                }
            }
            const BOTH: [ObjectBox; 2] = [boxed(0, 0.0, 0.6), boxed(1, 0.4, 1.0)];
            const ONE: [ObjectBox; 1] = [boxed(0, 0.0, 0.4)];
            if index == 0 { &BOTH } else { &ONE }
        }
    }

    #[test]
    fn patches_in_one_kind_of_box_count() {
        let map = |values: [f32; 3]| PatchMap {
            grid: Grid {
                rows: 1,
                columns: 3,
            },
            values: values.to_vec(),
        };
        let dog = |class: ClassId| class.0 == 0;
        // The middle of the first image is in both boxes; the second one's last two are in none.
        let (first, second) = (map([0.2, 9.0, 0.6]), map([0.8, 9.0, 9.0]));
        let figures = object_figures(&Boxed, &[0, 1], &dog, &[Some(&first), Some(&second)]);
        let figures = figures.unwrap().unwrap();
        assert_eq!((figures.pooled, figures.within), (0.5, 1.0));
        let none = object_figures(&Boxed, &[0, 1], &dog, &[Some(&first), None]);
        assert!(none.unwrap().is_none());
        let none = object_figures(&Boxed, &[1], &dog, &[Some(&second)]);
        assert!(none.unwrap().is_none());
    }
}
