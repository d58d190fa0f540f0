//! Heat maps beside the scores.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use defend_core::data::{Dataset, ResizeMode, RgbImage, write_png};
use defend_core::vit::Grid;
use defend_core::{Detector, Finding, MapScale, NoveltyDetector, PatchMap, overlay};
use image::{ImageBuffer, Luma, Rgb};

use crate::arguments::MapFormat;
use crate::images::{Found, make_folder};

/// Longest side of an overlay, pixels: the few hundred or thousand values of a map have no detail for more.
const LONGEST_SIDE: u32 = 1024;

/// A folder of maps.
pub(crate) struct MapFolder {
    folder: PathBuf,
    format: MapFormat,
    scale: MapScale,
    /// Whether the detector saw the whole image, so that its map covers it; what it saw is shown otherwise.
    whole: bool,
    /// File of each image, by its position among the images.
    files: Vec<PathBuf>,
    /// Files that no map may replace.
    inputs: HashSet<PathBuf>,
    written: usize,
}

impl MapFolder {
    pub(crate) fn make(
        folder: &Path,
        format: MapFormat,
        detector: &Detector,
        found: &Found,
    ) -> Result<Self> {
        make_folder(folder)?;
        let inputs = found.paths.iter().filter_map(|p| p.canonicalize().ok());
        Ok(Self {
            folder: folder.to_owned(),
            format,
            scale: detector.map_scale().clone(),
            whole: sees_whole(detector),
            files: names(found, extension(format)),
            inputs: inputs.collect(),
            written: 0,
        })
    }

    /// Whether no map was written.
    pub(crate) fn is_empty(&self) -> bool {
        self.written == 0
    }

    /// Writes the map of a finding, and says where; `None` for one without a map.
    pub(crate) fn write(
        &mut self,
        finding: &Finding,
        images: &Arc<dyn Dataset>,
        resized: &RgbImage,
    ) -> Result<Option<PathBuf>> {
        let Some(map) = &finding.novelty.map else {
            return Ok(None);
        };
        let file = self.files.get(finding.index);
        let path = self
            .folder
            .join(file.context("a finding without an image")?);
        if path
            .canonicalize()
            .is_ok_and(|path| self.inputs.contains(&path))
        {
            bail!(
                "the map {} would replace an image that is scored",
                path.display()
            );
        }
        if let Some(parent) = path.parent() {
            make_folder(parent)?;
        }
        self.write_to(&path, finding, map, images, resized)
            .with_context(|| format!("cannot write the map {}", path.display()))?;
        self.written += 1;
        Ok(Some(path))
    }

    fn write_to(
        &self,
        path: &Path,
        finding: &Finding,
        map: &PatchMap,
        images: &Arc<dyn Dataset>,
        resized: &RgbImage,
    ) -> Result<()> {
        match self.format {
            MapFormat::Overlay => {
                let original = if self.whole {
                    shrunk(images.image_at_least(finding.index, [LONGEST_SIDE; 2])?)
                } else {
                    resized.clone()
                };
                let image = with_legend(&overlay(&original, map, &self.scale), self.scale.span);
                write_png(path, image)?;
            }
            MapFormat::Png16 => write_png(path, self.sixteen_bits(map))?,
            MapFormat::Npy => {
                defend_files::write(path, &npy(map.grid, &self.scale.above(map)))?;
            }
        }
        Ok(())
    }

    /// Half of the range up to the overlay's full colour.
    fn sixteen_bits(&self, map: &PatchMap) -> ImageBuffer<Luma<u16>, Vec<u16>> {
        let (columns, above) = (map.grid.columns, self.scale.above(map));
        let per_level = 32768.0 / self.scale.span.max(f32::EPSILON);
        ImageBuffer::from_fn(columns as u32, map.grid.rows as u32, |x, y| {
            let value = above.get(y as usize * columns + x as usize);
            // A cast of a float saturates.
            Luma([(value.copied().unwrap_or(0.0) * per_level) as u16])
        })
    }
}

/// NumPy's format, version 1: a header of a multiple of 64 bytes, then the values.
fn npy(Grid { rows, columns }: Grid, values: &[f32]) -> Vec<u8> {
    const MAGIC: &[u8] = b"\x93NUMPY\x01\x00";
    let header =
        format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}");
    let end = (MAGIC.len() + 2 + header.len() + 1).next_multiple_of(64);
    let length = (end - MAGIC.len() - 2) as u16;
    let mut bytes = [MAGIC, &length.to_le_bytes(), header.as_bytes()].concat();
    bytes.resize(end - 1, b' ');
    bytes.push(b'\n');
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    bytes
}

/// Whether a detector sees whole images, so that its maps cover them.
pub(crate) fn sees_whole(detector: &Detector) -> bool {
    detector.config().resize_mode == ResizeMode::Squash && detector.preprocess().region.is_none()
}

fn extension(format: MapFormat) -> &'static str {
    match format {
        MapFormat::Overlay | MapFormat::Png16 => "png",
        MapFormat::Npy => "npy",
    }
}

/// Longest name of a file, bytes, with room for what is added to it; file systems allow 255.
const LONGEST_NAME: usize = 200;

/// The file of each image's map: `a/b.jpg` becomes `a/b.jpg.png`. Where two images have one name, or a name is too long, the hash of the image's
/// path is added: it does not depend on the order in which they were given.
fn names(found: &Found, extension: &str) -> Vec<PathBuf> {
    let plain: Vec<PathBuf> = found
        .inside
        .iter()
        .map(|inside| {
            let parts = inside.components();
            let parts = parts.filter(|part| matches!(part, std::path::Component::Normal(_)));
            parts.collect()
        })
        .collect();
    let mut times: HashMap<&Path, usize> = HashMap::new();
    for path in &plain {
        *times.entry(path).or_default() += 1;
    }
    let pairs = plain.iter().zip(&found.paths);
    pairs
        .map(|(inside, path)| {
            let name = inside.file_name().unwrap_or_default().to_string_lossy();
            let long = name.len() > LONGEST_NAME;
            let twice = times.get(inside.as_path()).is_some_and(|times| *times > 1);
            if !(long || twice) && inside.to_str().is_some() {
                return inside.with_file_name(format!("{name}.{extension}"));
            }
            let whole = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            let hash = blake3::hash(whole.as_os_str().as_encoded_bytes()).to_hex();
            let start: String = name.chars().take(LONGEST_NAME / 4).collect();
            inside.with_file_name(format!("{start}.{}.{extension}", &hash[..8]))
        })
        .collect()
}

/// Height of the legend below an overlay, pixels.
const LEGEND: u32 = 12;

/// The overlay with a bar of its colours below: from what is usual at the left to full novelty at the right.
pub(crate) fn with_legend(overlay: &RgbImage, span: f32) -> RgbImage {
    let (width, height) = overlay.dimensions();
    let mut image = RgbImage::from_pixel(width, height + LEGEND, Rgb([255; 3]));
    image::imageops::replace(&mut image, overlay, 0, 0);
    let scale = MapScale {
        usual: vec![0.0; width as usize],
        span,
    };
    let ramp = PatchMap {
        grid: Grid {
            rows: 1,
            columns: width as usize,
        },
        values: (0..width)
            .map(|x| span * (x as f32 + 0.5) / width as f32)
            .collect(),
    };
    let grey = RgbImage::from_pixel(width, LEGEND - 2, Rgb([128; 3]));
    let bar = defend_core::overlay(&grey, &ramp, &scale);
    image::imageops::replace(&mut image, &bar, 0, i64::from(height) + 2);
    image
}

fn shrunk(image: RgbImage) -> RgbImage {
    let (width, height) = image.dimensions();
    let longest = width.max(height);
    if longest <= LONGEST_SIDE {
        return image;
    }
    let side = |s: u32| {
        let scaled = u64::from(s) * u64::from(LONGEST_SIDE) / u64::from(longest);
        u32::try_from(scaled).unwrap_or(LONGEST_SIDE).max(1)
    };
    image::imageops::thumbnail(&image, side(width), side(height))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_maps_do_not_depend_on_the_order() {
        let found = |pairs: &[(&str, &str)]| Found {
            paths: pairs.iter().map(|(path, _)| path.into()).collect(),
            inside: pairs.iter().map(|(_, inside)| inside.into()).collect(),
        };
        let long = "x".repeat(252);
        let pairs = [
            ("one/a/b.jpg", "a/b.jpg"),
            ("two/a/b.jpg", "a/b.jpg"),
            ("c.jpg", "../c.jpg"),
            (&long, &long),
        ];
        let there = names(&found(&pairs), "png");
        assert_eq!(there[2], Path::new("c.jpg.png"));
        assert_ne!(there[0], there[1]);
        assert!(there[0].starts_with("a") && there[3].as_os_str().len() < 255);
        let mut back = pairs;
        back.reverse();
        let mut back = names(&found(&back), "png");
        back.reverse();
        assert_eq!(there, back);
    }

    #[test]
    fn the_legend_goes_from_grey_to_full_colour() {
        let image = with_legend(&RgbImage::new(40, 30), 2.0);
        assert_eq!(image.dimensions(), (40, 42));
        let bar = |x| image.get_pixel(x, 38).0;
        let strength = |[r, g, b]: [u8; 3]| r.abs_diff(g).max(g.abs_diff(b));
        assert!(
            strength(bar(0)) < 10 && strength(bar(39)) > 60,
            "{:?} {:?}",
            bar(0),
            bar(39)
        );
    }

    #[test]
    fn large_images_are_shrunk_and_strips_survive() {
        assert_eq!(shrunk(RgbImage::new(4096, 2048)).dimensions(), (1024, 512));
        assert_eq!(shrunk(RgbImage::new(1, 9000)).dimensions(), (1, 1024));
        assert_eq!(shrunk(RgbImage::new(30, 20)).dimensions(), (30, 20));
    }
}
