//! The role of everything that gives images.

use std::borrow::Cow;
use std::sync::Arc;

use image::{GrayImage, RgbImage};
use serde::{Deserialize, Serialize};

use crate::Error;

/// A class of objects: its position in [`Dataset::class_names`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ClassId(pub u32);

/// A box around an object, in shares of the image's width and height, `0..=1`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ObjectBox {
    /// What the object is.
    pub class: ClassId,
    /// Its left side.
    pub left: f32,
    /// Its upper side.
    pub top: f32,
    /// Its right side.
    pub right: f32,
    /// Its lower side.
    pub bottom: f32,
}

impl ObjectBox {
    /// From corners in pixels; `None` for an image or a box without an area.
    pub(crate) fn of_pixels(
        class: ClassId,
        [left, top, right, bottom]: [f64; 4],
        [width, height]: [f64; 2],
    ) -> Option<Self> {
        let share = |at: f64, of: f64| (at / of).clamp(0.0, 1.0) as f32;
        let found = Self {
            class,
            left: share(left, width),
            top: share(top, height),
            right: share(right, width),
            bottom: share(bottom, height),
        };
        // False for what is no number too.
        (width > 0.0 && height > 0.0 && found.left < found.right && found.top < found.bottom)
            .then_some(found)
    }

    /// Whether it holds a point, in shares of width and height.
    pub fn contains(&self, x: f32, y: f32) -> bool {
        (self.left..=self.right).contains(&x) && (self.top..=self.bottom).contains(&y)
    }
}

/// The two halves of a data set that its authors split.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Split {
    /// What a model may learn from.
    Train,
    /// What it is judged on.
    Test,
}

/// Images in a fixed order, with the classes of the objects they show where these are known.
///
/// ```
/// use std::borrow::Cow;
/// use defend_data::{ClassId, Dataset, Error};
/// use image::RgbImage;
///
/// /// Grey images, one for each level.
/// struct Greys;
///
/// impl Dataset for Greys {
///     fn len(&self) -> usize {
///         256
///     }
///
///     fn name(&self, index: usize) -> Cow<'_, str> {
///         format!("grey {index}").into()
///     }
///
///     fn image(&self, index: usize) -> Result<RgbImage, Error> {
///         let level = u8::try_from(index).map_err(|_| Error::Index { index, len: 256 })?;
///         Ok(RgbImage::from_pixel(32, 32, image::Rgb([level; 3])))
///     }
///
///     fn classes(&self, _: usize) -> &[ClassId] {
///         &[]
///     }
///
///     fn class_names(&self) -> &[String] {
///         &[]
///     }
/// }
///
/// assert_eq!(Greys.image(7)?.get_pixel(0, 0).0, [7, 7, 7]);
/// assert!(Greys.image(256).is_err());
/// # Ok::<(), Error>(())
/// ```
pub trait Dataset: Send + Sync {
    /// Number of images.
    fn len(&self) -> usize;

    /// Whether there is no image.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Name of an image for reports, a path where there is one; empty past the end.
    fn name(&self, index: usize) -> Cow<'_, str>;

    /// Reads an image in its full size.
    ///
    /// # Errors
    /// Those of [`read_image`](crate::read_image) for files; [`Error::Index`] past the end.
    fn image(&self, index: usize) -> Result<RgbImage, Error>;

    /// As [`Dataset::image`], or a reduced form of the image whose width and height are at least `least`: what is going to be made
    /// smaller anyway need not be decoded whole. By default the image in its full size.
    ///
    /// # Errors
    /// Those of [`Dataset::image`].
    fn image_at_least(&self, index: usize, least: [u32; 2]) -> Result<RgbImage, Error> {
        let _ = least;
        self.image(index)
    }

    /// Classes of the objects in an image, each once, ascending; empty for an unlabelled image
    /// and past the end.
    fn classes(&self, index: usize) -> &[ClassId];

    /// Boxes around the objects that [`Dataset::classes`] names; empty for sets without boxes, and past the end.
    fn boxes(&self, index: usize) -> &[ObjectBox] {
        let _ = index;
        &[]
    }

    /// Where the novelty is: non-zero pixels, in the image's own size; `None` for sets without masks
    /// and for normal images.
    ///
    /// # Errors
    /// [`Error::Index`] past the end; of sets with masks those of [`read_image`](crate::read_image),
    /// [`Error::Missing`] and [`Error::MaskSize`].
    fn mask(&self, index: usize) -> Result<Option<GrayImage>, Error> {
        let len = self.len();
        if index < len {
            Ok(None)
        } else {
            Err(Error::Index { index, len })
        }
    }

    /// Names of the classes, by [`ClassId`]; empty for unlabelled data.
    fn class_names(&self) -> &[String];

    /// Class of this name.
    fn class(&self, name: &str) -> Option<ClassId> {
        let position = self.class_names().iter().position(|known| known == name)?;
        u32::try_from(position).ok().map(ClassId)
    }
}

impl<T: Dataset + ?Sized> Dataset for Arc<T> {
    fn len(&self) -> usize {
        (**self).len()
    }

    fn name(&self, index: usize) -> Cow<'_, str> {
        (**self).name(index)
    }

    fn image(&self, index: usize) -> Result<RgbImage, Error> {
        (**self).image(index)
    }

    fn image_at_least(&self, index: usize, least: [u32; 2]) -> Result<RgbImage, Error> {
        (**self).image_at_least(index, least)
    }

    fn classes(&self, index: usize) -> &[ClassId] {
        (**self).classes(index)
    }

    fn boxes(&self, index: usize) -> &[ObjectBox] {
        (**self).boxes(index)
    }

    fn mask(&self, index: usize) -> Result<Option<GrayImage>, Error> {
        (**self).mask(index)
    }

    fn class_names(&self) -> &[String] {
        (**self).class_names()
    }
}

/// The sample at `index`, or the error that says how many there are.
pub(crate) fn sample<T>(samples: &[T], index: usize) -> Result<&T, Error> {
    samples.get(index).ok_or(Error::Index {
        index,
        len: samples.len(),
    })
}
