//! Images to network input, as Pillow and torchvision do it.

use std::borrow::Cow;

use fast_image_resize::{
    FilterType, ResizeAlg, ResizeOptions, Resizer,
    images::{TypedImage, TypedImageRef},
    pixels::U8x3,
};
use image::{RgbImage, imageops};
use serde::{Deserialize, Serialize};

use crate::{Dataset, Error, Region, decode_image, decode_image_at_least};

/// Longest image, in units of its shorter side, that a centre crop resizes whole.
const MAX_ASPECT: u32 = 32;

/// How an image of any shape becomes a square.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum ResizeMode {
    /// Both sides are resized to the input's size: shapes change, but no object is lost.
    #[default]
    Squash,
    /// timm's evaluation: the shorter side is resized to `size / crop_pct`, then the centre is cut
    /// out.
    CenterCrop {
        /// Side of the crop over the resized shorter side, in `0.05..=1`.
        crop_pct: f32,
    },
}

/// Kernel of the resize; widened when it shrinks ("antialias"), as Pillow does.
///
/// Weights have fewer bits than Pillow's: a value may differ from Pillow's by one grey level.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Interpolation {
    /// Catmull-Rom cubic (a = -0.5), Pillow's `BICUBIC`.
    #[default]
    Bicubic,
    /// Triangle, Pillow's `BILINEAR`.
    Bilinear,
}

/// What a checkpoint wants done to an image.
///
/// There is no default: size, mean and deviation belong to the checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preprocess {
    /// Width of the network's input in pixels, in `1..=4096`; its height too, as a rule.
    pub size: u32,
    /// Height of the network's input where it is another one, in `1..=4096`; only squashed images have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub height: Option<u32>,
    /// What is looked at of each image; all of it without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<Region>,
    /// Least width and height that is looked at of an image, pixels: one that is cut into tiles has to be as large as a tile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smallest: Option<u32>,
    /// Whether large JPEGs are decoded at a part of their size, which is at least twice what they are resized to
    /// ([`crate::decode_image_at_least`]). A region of interest needs whole images.
    #[serde(default)]
    pub reduced_decoding: bool,
    /// How an image becomes square.
    #[serde(default)]
    #[serde(alias = "fit")]
    pub resize_mode: ResizeMode,
    /// Kernel of the resize.
    #[serde(default)]
    pub filter: Interpolation,
    /// Mean of each channel on the `0..=1` scale.
    pub mean: [f32; 3],
    /// Standard deviation of each channel on the `0..=1` scale, above 0.
    pub std: [f32; 3],
}

impl Preprocess {
    /// Squashing, bicubic preprocessing for a checkpoint's `size`, `mean` and `std`.
    pub fn new(size: u32, mean: [f32; 3], std: [f32; 3]) -> Self {
        Self {
            size,
            height: None,
            region: None,
            smallest: None,
            reduced_decoding: true,
            resize_mode: ResizeMode::default(),
            filter: Interpolation::default(),
            mean,
            std,
        }
    }

    /// Checks every field against its range.
    ///
    /// # Errors
    /// [`Error::Config`] with the first field that is out of range, [`Error::Region`].
    pub fn validate(&self) -> Result<(), Error> {
        let check = |fine: bool, field, value: f32, expected| {
            let value = f64::from(value);
            if fine {
                Ok(())
            } else {
                Err(Error::Config {
                    field,
                    value,
                    expected,
                })
            }
        };
        check(
            (1..=4096).contains(&self.size),
            "size",
            self.size as f32,
            "1..=4096",
        )?;
        if let Some(height) = self.height {
            let fine = (1..=4096).contains(&height) && self.resize_mode == ResizeMode::Squash;
            check(
                fine,
                "height",
                height as f32,
                "1..=4096, or none where images are cropped",
            )?;
        }
        if let Some(region) = &self.region {
            region.validate()?;
        }
        if let ResizeMode::CenterCrop { crop_pct } = self.resize_mode {
            let fine = (0.05..=1.0).contains(&crop_pct);
            check(fine, "crop_pct", crop_pct, "0.05..=1")?;
        }
        for (mean, std) in self.mean.into_iter().zip(self.std) {
            check(mean.is_finite(), "mean", mean, "a finite number")?;
            check(
                std.is_finite() && std > 0.0,
                "std",
                std,
                "a finite number above 0",
            )?;
        }
        Ok(())
    }

    /// Width and height of the network's input, pixels.
    pub fn input_size(&self) -> (u32, u32) {
        (self.size, self.height.unwrap_or(self.size))
    }

    /// Reads an image of a data set and resizes it, see [`Preprocess::resize`].
    ///
    /// # Errors
    /// Those of [`Dataset::image`] and [`Preprocess::resize`].
    pub fn read(&self, dataset: &dyn Dataset, index: usize) -> Result<RgbImage, Error> {
        let image = match self.least_decoded() {
            Some(least) => dataset.image_at_least(index, least)?,
            None => dataset.image(index)?,
        };
        self.resize(&image)
    }

    /// Decodes an image file's content and resizes it; `origin` names it in errors.
    ///
    /// # Errors
    /// Those of [`decode_image`] and [`Preprocess::resize`].
    pub fn decode(&self, bytes: &[u8], origin: &str) -> Result<RgbImage, Error> {
        let image = match self.least_decoded() {
            Some(least) => decode_image_at_least(bytes, origin, least)?,
            None => decode_image(bytes, origin)?,
        };
        self.resize(&image)
    }

    /// Least width and height, pixels, that images are decoded at; none where they are decoded whole.
    fn least_decoded(&self) -> Option<[u32; 2]> {
        if !self.reduced_decoding || self.region.is_some() {
            return None;
        }
        let (width, height) = match self.resize_mode {
            ResizeMode::Squash => self.input_size(),
            ResizeMode::CenterCrop { crop_pct } => {
                let side = (self.size as f32 / crop_pct).ceil() as u32;
                (side, side)
            }
        };
        Some([width, height].map(|side| side.saturating_mul(2)))
    }

    /// Number of values in the network's input: three for each pixel.
    pub fn input_len(&self) -> usize {
        let (width, height) = self.input_size();
        3 * width as usize * height as usize
    }

    /// Cuts the region out of `image` and makes it as large as the network's input, 8-bit values, to be kept where it is used
    /// again.
    ///
    /// # Errors
    /// [`Error::Config`] as [`Self::validate`]; [`Error::EmptyImage`]; [`Error::Region`] for a region that does not lie in the
    /// image; [`Error::TooSmall`]; [`Error::Resize`].
    pub fn resize(&self, image: &RgbImage) -> Result<RgbImage, Error> {
        self.validate()?;
        let (width, height) = image.dimensions();
        if width == 0 || height == 0 {
            return Err(Error::EmptyImage { width, height });
        }
        let cut = match &self.region {
            Some(region) => Cow::Owned(region.cut(image, self.mean_colour())?),
            None => Cow::Borrowed(image),
        };
        let (width, height) = cut.dimensions();
        if let Some(smallest) = self.smallest
            && width.min(height) < smallest
        {
            return Err(Error::TooSmall {
                width,
                height,
                smallest,
            });
        }
        let (width, height) = self.input_size();
        match self.resize_mode {
            ResizeMode::Squash => self.resize_to(&cut, width, height),
            ResizeMode::CenterCrop { crop_pct } => self.resize_and_crop(&cut, crop_pct),
        }
    }

    /// The colour that is about 0 in the network's input.
    fn mean_colour(&self) -> [u8; 3] {
        self.mean
            .map(|mean| (255.0 * mean).round().clamp(0.0, 255.0) as u8)
    }

    fn resize_and_crop(&self, image: &RgbImage, crop_pct: f32) -> Result<RgbImage, Error> {
        let (width, height) = image.dimensions();
        let (short, long) = (width.min(height), width.max(height));
        // A strip of 1 x 10,000 px would be blown up to gigabytes, of which the crop keeps the middle.
        let kept = short.saturating_mul(MAX_ASPECT);
        if long > kept {
            let (w, h) = (width.min(kept), height.min(kept));
            let (x, y) = ((width - w) / 2, (height - h) / 2);
            let middle = imageops::crop_imm(image, x, y, w, h).to_image();
            return self.resize_and_crop(&middle, crop_pct);
        }
        // In f32, where 224 / 0.1 rounds back to 2240; the widened 0.1 would floor to 2239.
        let scaled = (self.size as f32 / crop_pct).floor() as u32;
        // torchvision: int(size * long / short)
        let other = (u64::from(scaled) * u64::from(long) / u64::from(short)) as u32;
        let (w, h) = if width <= height {
            (scaled, other)
        } else {
            (other, scaled)
        };
        let resized = self.resize_to(image, w, h)?;
        // torchvision: int(round((side - size) / 2)), and Python rounds halves to even.
        let margin = |side: u32| (f64::from(side - self.size) / 2.0).round_ties_even() as u32;
        Ok(imageops::crop_imm(&resized, margin(w), margin(h), self.size, self.size).to_image())
    }

    /// Rows first, as Pillow does: the 8-bit values between the two passes are clipped, so with a
    /// kernel that overshoots the order shows. The resizer on its own would begin with the columns.
    fn resize_to(&self, image: &RgbImage, width: u32, height: u32) -> Result<RgbImage, Error> {
        let rows = if image.width() == width {
            Cow::Borrowed(image)
        } else {
            Cow::Owned(self.pass(image, width, image.height())?)
        };
        if rows.height() == height {
            return Ok(rows.into_owned());
        }
        self.pass(&rows, width, height)
    }

    fn pass(&self, image: &RgbImage, width: u32, height: u32) -> Result<RgbImage, Error> {
        let filter = match self.filter {
            Interpolation::Bicubic => FilterType::CatmullRom,
            Interpolation::Bilinear => FilterType::Bilinear,
        };
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter));
        let mut resized = RgbImage::new(width, height);
        let fault = |source: Box<dyn std::error::Error + Send + Sync>| Error::Resize { source };
        let (from_width, from_height) = image.dimensions();
        // The one pixel type that there is: code for the others would double the time that this crate compiles.
        let from = TypedImageRef::<U8x3>::from_buffer(from_width, from_height, image.as_raw())
            .map_err(|source| fault(source.into()))?;
        let mut to = TypedImage::<U8x3>::from_buffer(width, height, &mut resized)
            .map_err(|source| fault(source.into()))?;
        Resizer::new()
            .resize_typed(&from, &mut to, &options)
            .map_err(|source| fault(source.into()))?;
        Ok(resized)
    }

    /// Writes a resized image as network input: `(v / 255 - mean) / std`, channels first.
    ///
    /// `image`: the result of [`Self::resize`]; `input`: `[3, height, width]`, row-major.
    /// # Errors
    /// [`Error::ImageSize`] and [`Error::InputLength`] when either has another size.
    pub fn normalize_into(&self, image: &RgbImage, input: &mut [f32]) -> Result<(), Error> {
        let expected = self.input_len();
        let (width, height) = image.dimensions();
        let (input_width, input_height) = self.input_size();
        if (width, height) != (input_width, input_height) {
            return Err(Error::ImageSize {
                width,
                height,
                input_width,
                input_height,
            });
        }
        if input.len() != expected {
            return Err(Error::InputLength {
                found: input.len(),
                expected,
            });
        }
        let raw = image.as_raw();
        for (c, plane) in input.chunks_exact_mut(expected / 3).enumerate() {
            let (mean, std) = (self.mean[c], self.std[c]);
            let table: [f32; 256] = std::array::from_fn(|v| (v as f32 / 255.0 - mean) / std);
            for (value, pixel) in plane.iter_mut().zip(raw.chunks_exact(3)) {
                *value = table[usize::from(pixel[c])];
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;

    fn preprocess(resize_mode: ResizeMode) -> Preprocess {
        Preprocess {
            resize_mode,
            ..Preprocess::new(4, [0.5, 0.25, 0.0], [0.5, 0.25, 1.0])
        }
    }

    #[test]
    fn squash_keeps_a_constant_image() {
        for (width, height) in [(1, 1), (1, 300), (17, 5), (4, 4)] {
            let image = RgbImage::from_pixel(width, height, Rgb([9, 99, 199]));
            let resized = preprocess(ResizeMode::Squash).resize(&image).unwrap();
            assert_eq!(resized, RgbImage::from_pixel(4, 4, Rgb([9, 99, 199])));
        }
    }

    #[test]
    fn center_crop_takes_the_centre() {
        let image = RgbImage::from_fn(
            11,
            4,
            |x, _| if x == 3 { Rgb([255; 3]) } else { Rgb([0; 3]) },
        );
        // The margin (11 - 4) / 2 = 3.5 rounds to the even 4, as Python does: column 3 is cut off.
        let cropped = preprocess(ResizeMode::CenterCrop { crop_pct: 1.0 })
            .resize(&image)
            .unwrap();
        assert_eq!(cropped, RgbImage::new(4, 4));
    }

    #[test]
    fn strips_do_not_fill_the_memory() {
        let image = RgbImage::from_pixel(60_000, 1, Rgb([7; 3]));
        let resize_mode = ResizeMode::CenterCrop { crop_pct: 0.9 };
        let preprocess = Preprocess {
            resize_mode,
            ..Preprocess::new(224, [0.5; 3], [0.5; 3])
        };
        let cropped = preprocess.resize(&image).unwrap();
        assert_eq!(cropped, RgbImage::from_pixel(224, 224, Rgb([7; 3])));
    }

    #[test]
    fn normalised_input_is_channels_first() {
        let mut image = RgbImage::from_pixel(4, 4, Rgb([0, 255, 51]));
        image.put_pixel(1, 0, Rgb([255, 0, 0]));
        let preprocess = preprocess(ResizeMode::Squash);
        let mut input = vec![0.0; preprocess.input_len()];
        preprocess.normalize_into(&image, &mut input).unwrap();
        for (at, value) in [
            (0, -1.0),
            (1, 1.0),
            (16, 3.0),
            (17, -1.0),
            (32, 0.2),
            (33, 0.0),
        ] {
            let found: f32 = input[at];
            assert!((found - value).abs() < 1e-6, "{at}: {found}");
        }
        let error = preprocess
            .normalize_into(&image, &mut input[1..])
            .unwrap_err();
        assert!(matches!(
            error,
            Error::InputLength {
                found: 47,
                expected: 48,
                ..
            }
        ));
        let oblong = RgbImage::new(2, 8);
        let error = preprocess.normalize_into(&oblong, &mut input).unwrap_err();
        assert!(matches!(
            error,
            Error::ImageSize {
                width: 2,
                height: 8,
                input_width: 4,
                ..
            }
        ));
    }

    #[test]
    fn bad_settings_are_refused_with_their_name() {
        let good = preprocess(ResizeMode::Squash);
        let bad = [
            (
                "size",
                Preprocess {
                    size: 0,
                    ..good.clone()
                },
            ),
            (
                "crop_pct",
                preprocess(ResizeMode::CenterCrop { crop_pct: 1.5 }),
            ),
            (
                "crop_pct",
                preprocess(ResizeMode::CenterCrop { crop_pct: f32::NAN }),
            ),
            (
                "mean",
                Preprocess {
                    mean: [f32::NAN; 3],
                    ..good.clone()
                },
            ),
            (
                "std",
                Preprocess {
                    std: [0.5, 0.0, 0.5],
                    ..good.clone()
                },
            ),
        ];
        for (field, config) in bad {
            let error = config.resize(&RgbImage::new(2, 2)).unwrap_err();
            assert!(error.to_string().starts_with(field), "{error}");
        }
        let empty = good.resize(&RgbImage::new(0, 3));
        assert!(matches!(empty, Err(Error::EmptyImage { .. })));
    }

    #[test]
    fn settings_survive_json_and_unknown_ones_do_not() {
        for resize_mode in [ResizeMode::Squash, ResizeMode::CenterCrop { crop_pct: 0.9 }] {
            let text = serde_json::to_string(&preprocess(resize_mode)).unwrap();
            assert_eq!(
                serde_json::from_str::<Preprocess>(&text).unwrap(),
                preprocess(resize_mode)
            );
        }
        let typo = r#"{"size": 224, "mean": [0, 0, 0], "std": [1, 1, 1], "fiter": "bicubic"}"#;
        assert!(serde_json::from_str::<Preprocess>(typo).is_err());
    }
}
