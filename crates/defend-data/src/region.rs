//! The part of an image that is looked at.

use std::borrow::Cow;

use image::{GrayImage, RgbImage, imageops};
use serde::{Deserialize, Serialize};

use crate::Error;

/// Longest side that a mask is kept at; larger ones are reduced.
const MASK_SIDE: u32 = 1024;
/// Grey values from here on are inside.
const INSIDE: u8 = 128;
/// How much the shapes of an image and of its mask may differ, as a share.
const SHAPE_TOLERANCE: f64 = 0.01;

/// The part of an image that is looked at: its region of interest. The rest has no influence on anything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Region {
    /// A rectangle, in pixels of the image; it is cut out.
    Rectangle {
        /// First column, from 0 at the left.
        x: u32,
        /// First row, from 0 at the top.
        y: u32,
        /// Columns, at least 1.
        width: u32,
        /// Rows, at least 1.
        height: u32,
    },
    /// Any shape: its bounding box is cut out, and what lies outside of the shape is painted in the mean colour of the checkpoint.
    Mask(Mask),
}

/// A shape over an image, for images of its own size or of another with the same ratio of the sides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mask {
    width: u32,
    height: u32,
    /// Lengths of the runs of pixels in row-major order, outside and inside in turn; the first is outside.
    runs: Vec<u32>,
}

impl Mask {
    /// From an image in which the shape is white. One of more than 1,024 pixels a side is reduced.
    ///
    /// # Errors
    /// [`Error::Region`] when nothing is white.
    pub fn new(image: &GrayImage) -> Result<Self, Error> {
        let (width, height) = image.dimensions();
        let longest = width.max(height);
        let reduced = if longest > MASK_SIDE {
            let side = |side: u32| {
                let side = u64::from(side) * u64::from(MASK_SIDE) / u64::from(longest);
                u32::try_from(side).unwrap_or(MASK_SIDE).max(1)
            };
            let (width, height) = (side(width), side(height));
            Cow::Owned(imageops::resize(
                image,
                width,
                height,
                imageops::FilterType::Nearest,
            ))
        } else {
            Cow::Borrowed(image)
        };
        let (mut runs, mut inside) = (vec![0], false);
        for value in reduced.as_raw() {
            if (*value >= INSIDE) != inside {
                inside = !inside;
                runs.push(0);
            }
            if let Some(run) = runs.last_mut() {
                *run += 1;
            }
        }
        let (width, height) = reduced.dimensions();
        let mask = Self {
            width,
            height,
            runs,
        };
        mask.validate()?;
        Ok(mask)
    }

    fn validate(&self) -> Result<(), Error> {
        let area = u64::from(self.width) * u64::from(self.height);
        let runs: u64 = self.runs.iter().copied().map(u64::from).sum();
        let fault = |found: String, expected: &'static str| Err(Error::Region { found, expected });
        if area == 0 || self.width.max(self.height) > MASK_SIDE || runs != area {
            let found = format!("a mask of {} x {} px", self.width, self.height);
            return fault(
                format!("{found} with runs of {runs} px"),
                "runs of as many pixels, at most 1024 a side",
            );
        }
        if self.runs.iter().skip(1).step_by(2).all(|run| *run == 0) {
            return fault(
                "a mask without a white pixel".into(),
                "white where the image is to be looked at",
            );
        }
        Ok(())
    }

    /// Whether each pixel is inside, row-major.
    fn pixels(&self) -> Vec<bool> {
        let mut pixels = Vec::with_capacity(self.width as usize * self.height as usize);
        for (i, run) in self.runs.iter().enumerate() {
            pixels.extend(std::iter::repeat_n(i % 2 == 1, *run as usize));
        }
        pixels
    }

    fn cut(&self, image: &RgbImage, fill: [u8; 3]) -> Result<RgbImage, Error> {
        let (width, height) = image.dimensions();
        let shape = |width: u32, height: u32| f64::from(width) / f64::from(height);
        let ratio = shape(width, height) / shape(self.width, self.height);
        if (ratio - 1.0).abs() > SHAPE_TOLERANCE {
            return Err(Error::Region {
                found: format!(
                    "a mask of {} x {} px over an image of {width} x {height} px",
                    self.width, self.height
                ),
                expected: "the same ratio of width to height",
            });
        }
        let pixels = self.pixels();
        // The pixel of the mask that lies over a pixel of the image.
        let under = |at: u32, side: u32, mask: u32| {
            (u64::from(at) * u64::from(mask) / u64::from(side.max(1))) as usize
        };
        let columns: Vec<usize> = (0..width).map(|x| under(x, width, self.width)).collect();
        let inside = |row: usize, column: usize| {
            pixels.get(row * self.width as usize + column) == Some(&true)
        };
        let mut painted = image.clone();
        let (mut left, mut right, mut top, mut bottom) = (width, 0, height, 0);
        for (y, row) in painted.rows_mut().enumerate() {
            let y = y as u32;
            let mask_row = under(y, height, self.height);
            for (x, pixel) in row.enumerate() {
                if columns
                    .get(x)
                    .is_some_and(|&column| inside(mask_row, column))
                {
                    let x = x as u32;
                    (left, right) = (left.min(x), right.max(x));
                    (top, bottom) = (top.min(y), y);
                } else {
                    pixel.0 = fill;
                }
            }
        }
        if left > right || top > bottom {
            // An image far smaller than its mask, whose pixels all fall beside the shape.
            return Err(Error::Region {
                found: format!("an image of {width} x {height} px, too small for its mask"),
                expected: "a pixel inside the mask",
            });
        }
        let (width, height) = (right - left + 1, bottom - top + 1);
        Ok(imageops::crop_imm(&painted, left, top, width, height).to_image())
    }
}

impl Region {
    /// Checks what can be checked without an image.
    ///
    /// # Errors
    /// [`Error::Region`].
    pub fn validate(&self) -> Result<(), Error> {
        match self {
            Self::Rectangle { width, height, .. } if *width == 0 || *height == 0 => {
                Err(Error::Region {
                    found: format!("a rectangle of {width} x {height} px"),
                    expected: "at least 1 x 1",
                })
            }
            Self::Rectangle { .. } => Ok(()),
            Self::Mask(mask) => mask.validate(),
        }
    }

    /// The region of an image; what does not belong to it is `fill`.
    ///
    /// # Errors
    /// [`Error::Region`] for a rectangle that does not lie in the image, and for an image of another shape than the mask.
    pub fn cut(&self, image: &RgbImage, fill: [u8; 3]) -> Result<RgbImage, Error> {
        self.validate()?;
        let (x, y, width, height) = match self {
            Self::Mask(mask) => return mask.cut(image, fill),
            &Self::Rectangle {
                x,
                y,
                width,
                height,
            } => (x, y, width, height),
        };
        let (image_width, image_height) = image.dimensions();
        let ends = |from: u32, side: u32, whole: u32| {
            from.checked_add(side).is_some_and(|end| end <= whole)
        };
        if !ends(x, width, image_width) || !ends(y, height, image_height) {
            return Err(Error::Region {
                found: format!(
                    "a rectangle of {width} x {height} px at ({x}, {y}) over an image of {image_width} x {image_height} px"
                ),
                expected: "one that lies in the image",
            });
        }
        Ok(imageops::crop_imm(image, x, y, width, height).to_image())
    }
}

#[cfg(test)]
mod tests {
    use image::{Luma, Rgb};

    use super::*;

    fn numbered(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| Rgb([x as u8, y as u8, 7]))
    }

    #[test]
    fn a_rectangle_is_cut_out_and_has_to_lie_in_the_image() {
        let rectangle = |x, y, width, height| Region::Rectangle {
            x,
            y,
            width,
            height,
        };
        let cut = rectangle(2, 1, 3, 2).cut(&numbered(5, 3), [0; 3]).unwrap();
        assert_eq!(cut.dimensions(), (3, 2));
        assert_eq!(cut.get_pixel(0, 0).0, [2, 1, 7]);
        for outside in [
            rectangle(3, 1, 3, 2),
            rectangle(2, 2, 3, 2),
            rectangle(u32::MAX, 0, 2, 2),
        ] {
            let error = outside.cut(&numbered(5, 3), [0; 3]).unwrap_err();
            assert!(error.to_string().contains("5 x 3"), "{error}");
        }
        let error = rectangle(0, 0, 0, 4).validate().unwrap_err();
        assert!(error.to_string().contains("0 x 4"), "{error}");
    }

    #[test]
    fn a_mask_cuts_its_box_and_paints_the_rest() {
        // A cross of three columns and rows around (2, 1).
        let mask = GrayImage::from_fn(5, 4, |x, y| {
            Luma([if (x == 2 && y < 3) || (y == 1 && (1..4).contains(&x)) {
                255
            } else {
                0
            }])
        });
        let region = Region::Mask(Mask::new(&mask).unwrap());
        let cut = region.cut(&numbered(5, 4), [9; 3]).unwrap();
        assert_eq!(cut.dimensions(), (3, 3));
        assert_eq!(cut.get_pixel(0, 0).0, [9; 3]);
        assert_eq!(cut.get_pixel(1, 0).0, [2, 0, 7]);
        assert_eq!(cut.get_pixel(0, 1).0, [1, 1, 7]);
        // Twice the size is the same shape; a square is not.
        let twice = region.cut(&numbered(10, 8), [9; 3]).unwrap();
        assert_eq!(twice.dimensions(), (6, 6));
        assert_eq!(twice.get_pixel(2, 0).0, [4, 0, 7]);
        let error = region.cut(&numbered(8, 8), [9; 3]).unwrap_err();
        assert!(error.to_string().contains("ratio"), "{error}");
        let json = serde_json::to_string(&region).unwrap();
        assert_eq!(serde_json::from_str::<Region>(&json).unwrap(), region);
    }

    #[test]
    fn masks_of_nothing_and_damaged_ones_are_refused() {
        let error = Mask::new(&GrayImage::new(3, 3)).unwrap_err();
        assert!(error.to_string().contains("white"), "{error}");
        let damaged = |runs| {
            Region::Mask(Mask {
                width: 3,
                height: 2,
                runs,
            })
        };
        assert!(damaged(vec![2, 4]).validate().is_ok());
        for runs in [vec![], vec![6], vec![2, 5], vec![u32::MAX, u32::MAX]] {
            assert!(damaged(runs).validate().is_err());
        }
        let large = GrayImage::from_pixel(3000, 1500, Luma([255]));
        let mask = Mask::new(&large).unwrap();
        assert_eq!((mask.width, mask.height), (1024, 512));
    }
}
