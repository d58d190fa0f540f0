//! Augmented views of photos: what a small backbone learns its teacher's features on.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use defend_core::Device;
use defend_core::data::{Dataset, ImageFolder, Preprocess, Region};
use defend_core::nn::Rng;
use defend_core::vit::{self, ImageSource};
use image::{RgbImage, imageops};
use rand::RngExt;
use rayon::prelude::*;

/// Photos are kept with their shorter side at most this long, pixels.
const KEPT_SIDE: u32 = 256;
/// Share of a photo's area that a view shows, drawn evenly from this range.
const AREA: [f64; 2] = [0.2, 1.0];
/// Ratio of a view's sides before it is squashed, drawn evenly on the logarithmic scale.
const ASPECT: [f64; 2] = [0.75, 4.0 / 3.0];
/// Share of the views whose colours change, by factors in this range.
const COLOUR: (f64, [f32; 2]) = (0.6, [0.6, 1.4]);
/// Share of the views without colours.
const GREY: f64 = 0.1;
/// Share of the views with few pixels, as small images enlarged, and how many a side they have.
const COARSE: (f64, [u32; 2]) = (0.25, [24, 112]);
/// Share of the views with a part of another photo, and the area that it takes.
const PASTED: (f64, [f64; 2]) = (0.25, [0.1, 0.5]);

/// Photos of a training set and how many views are made of each.
#[derive(Debug, Clone)]
pub(crate) struct Photos {
    pub(crate) paths: Vec<PathBuf>,
    pub(crate) views: usize,
}

impl Photos {
    /// From `PATH` or `PATH=VIEWS`: a folder, or a text file that names an image a line, seen from its own folder.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let (path, views) = match text.rsplit_once('=') {
            Some((path, views)) => (path, views.parse().context(text.to_owned())?),
            None => (text, 1),
        };
        ensure!(views > 0, "{text}: at least one view a photo");
        let path = Path::new(path);
        let paths = if path.is_dir() {
            ImageFolder::open(path)?.paths().to_vec()
        } else {
            let list = std::fs::read_to_string(path).context(path.display().to_string())?;
            let folder = path.parent().unwrap_or(Path::new("."));
            list.lines().map(|line| folder.join(line.trim())).collect()
        };
        Ok(Self { paths, views })
    }
}

/// A finite set of views: each is the same whenever it is asked for, and none is kept.
pub(crate) struct Views {
    photos: Vec<RgbImage>,
    /// The photo of each view.
    of: Vec<u32>,
    preprocess: Preprocess,
    seed: u64,
    device: Device,
}

impl Views {
    /// Reads photos and plans views of them.
    pub(crate) fn read(
        sets: &[Photos],
        preprocess: Preprocess,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let (mut photos, mut of) = (Vec::new(), Vec::new());
        for set in sets {
            let folder = ImageFolder::from_paths(set.paths.clone());
            let read: Vec<RgbImage> = (0..folder.len())
                .into_par_iter()
                .map(|i| Ok(small(&folder.image(i)?)))
                .collect::<Result<_>>()?;
            for photo in read {
                let index = u32::try_from(photos.len())?;
                of.extend(std::iter::repeat_n(index, set.views));
                photos.push(photo);
            }
        }
        Ok(Self {
            photos,
            of,
            preprocess,
            seed,
            device: device.clone(),
        })
    }

    pub(crate) fn photos(&self) -> usize {
        self.photos.len()
    }

    /// A view's pixels, at the network's size.
    fn view(&self, index: usize) -> Result<RgbImage, defend_core::data::Error> {
        let mut rng = Rng::stream(self.seed, index as u64);
        let mut view = self.part(self.of[index] as usize, &mut rng)?;
        if rng.random_bool(PASTED.0) {
            let other = rng.random_range(0..self.photos.len());
            let other = self.part(other, &mut rng)?;
            let (width, height) = view.dimensions();
            let (w, h) = sides(
                width,
                height,
                rng.random_range(PASTED.1[0]..PASTED.1[1]),
                &mut rng,
            );
            let (x, y) = corner(width, height, w, h, &mut rng);
            let part = imageops::crop_imm(&other, x, y, w, h).to_image();
            imageops::replace(&mut view, &part, i64::from(x), i64::from(y));
        }
        if rng.random_bool(COARSE.0) {
            let side = rng.random_range(COARSE.1[0]..=COARSE.1[1]);
            let coarse = Preprocess {
                size: side,
                ..self.preprocess.clone()
            };
            view = self.preprocess.resize(&coarse.resize(&view)?)?;
        }
        Ok(view)
    }

    /// A random part of a photo, perhaps mirrored and in other colours.
    fn part(&self, photo: usize, rng: &mut Rng) -> Result<RgbImage, defend_core::data::Error> {
        let photo = &self.photos[photo];
        let (width, height) = photo.dimensions();
        let (w, h) = sides(width, height, rng.random_range(AREA[0]..AREA[1]), rng);
        let (x, y) = corner(width, height, w, h, rng);
        let preprocess = Preprocess {
            region: Some(Region::Rectangle {
                x,
                y,
                width: w,
                height: h,
            }),
            ..self.preprocess.clone()
        };
        let mut part = preprocess.resize(photo)?;
        if rng.random_bool(0.5) {
            imageops::flip_horizontal_in_place(&mut part);
        }
        if rng.random_bool(COLOUR.0) {
            let [low, high] = COLOUR.1;
            let [bright, contrast, saturation] =
                std::array::from_fn(|_| rng.random_range(low..high));
            recolour(&mut part, bright, contrast, saturation);
        }
        if rng.random_bool(GREY) {
            recolour(&mut part, 1.0, 1.0, 0.0);
        }
        Ok(part)
    }
}

impl ImageSource for Views {
    fn len(&self) -> usize {
        self.of.len()
    }

    fn images(&self, indices: &[usize]) -> Result<defend_core::Tensor, vit::Error> {
        let length = self.preprocess.input_len();
        let mut values = vec![0f32; indices.len() * length];
        values
            .par_chunks_mut(length)
            .zip(indices)
            .try_for_each(|(input, &index)| {
                self.preprocess.normalize_into(&self.view(index)?, input)
            })
            .map_err(|source| vit::Error::ImageSource {
                index: indices.first().copied().unwrap_or(0),
                source: Box::new(source),
            })?;
        let (width, height) = self.preprocess.input_size();
        let shape = (indices.len(), 3, height as usize, width as usize);
        Ok(defend_core::Tensor::from_vec(values, shape, &self.device)?)
    }
}

/// A copy whose shorter side is at most [`KEPT_SIDE`].
fn small(photo: &RgbImage) -> RgbImage {
    let (width, height) = photo.dimensions();
    let shorter = width.min(height);
    if shorter <= KEPT_SIDE {
        return photo.clone();
    }
    let side = |side: u32| (u64::from(side) * u64::from(KEPT_SIDE) / u64::from(shorter)) as u32;
    imageops::thumbnail(photo, side(width), side(height))
}

/// Width and height of a rectangle with a share of an area and a random shape.
fn sides(width: u32, height: u32, share: f64, rng: &mut Rng) -> (u32, u32) {
    let aspect = rng.random_range(ASPECT[0].ln()..ASPECT[1].ln()).exp();
    let area = f64::from(width) * f64::from(height) * share;
    let side = |wanted: f64, most: u32| (wanted.round() as u32).clamp(1, most);
    (
        side((area * aspect).sqrt(), width),
        side((area / aspect).sqrt(), height),
    )
}

fn corner(width: u32, height: u32, w: u32, h: u32, rng: &mut Rng) -> (u32, u32) {
    (
        rng.random_range(0..=width - w),
        rng.random_range(0..=height - h),
    )
}

/// Changes brightness, contrast and saturation by factors.
fn recolour(image: &mut RgbImage, brightness: f32, contrast: f32, saturation: f32) {
    let grey =
        |p: &[u8]| 0.299 * f32::from(p[0]) + 0.587 * f32::from(p[1]) + 0.114 * f32::from(p[2]);
    let pixels = image.as_raw().chunks_exact(3);
    let mean = brightness * pixels.map(grey).sum::<f32>() / (image.as_raw().len() / 3) as f32;
    for pixel in image.chunks_exact_mut(3) {
        let grey = brightness * grey(pixel);
        for value in pixel {
            let bright = brightness * f32::from(*value);
            let saturated = grey + saturation * (bright - grey);
            *value = (mean + contrast * (saturated - mean))
                .round()
                .clamp(0.0, 255.0) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn views() -> Views {
        let photo = |tint: u8| {
            RgbImage::from_fn(90, 60, |x, y| image::Rgb([x as u8 * 2, y as u8 * 3, tint]))
        };
        Views {
            photos: vec![photo(20), photo(220)],
            of: vec![0, 0, 1, 1],
            preprocess: Preprocess::new(32, [0.5; 3], [0.5; 3]),
            seed: 3,
            device: Device::Cpu,
        }
    }

    #[test]
    fn a_view_is_the_same_whenever_it_is_asked_for_and_unlike_the_others() -> Result<()> {
        let read = |indices: &[usize]| -> Result<Vec<Vec<f32>>> {
            let images = views().images(indices)?;
            Ok(images.flatten_from(1)?.to_vec2()?)
        };
        let (all, some) = (read(&[0, 1, 2, 3])?, read(&[2, 0])?);
        assert_eq!(all.len(), 4);
        assert_eq!((&some[0], &some[1]), (&all[2], &all[0]));
        assert!(all[0] != all[1] && all[2] != all[3]);
        Ok(())
    }

    #[test]
    fn colours_go_and_come() {
        let mut image = RgbImage::from_pixel(2, 2, image::Rgb([200, 100, 0]));
        let before = image.clone();
        recolour(&mut image, 1.0, 1.0, 1.0);
        assert_eq!(image, before);
        recolour(&mut image, 1.0, 1.0, 0.0);
        assert_eq!(image.get_pixel(0, 0).0, [119, 119, 119]);
    }
}
