//! Heat maps beside the scores.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use defend_core::data::{Dataset, ResizeMode, RgbImage};
use defend_core::{Detector, Finding, MapScale, NoveltyDetector, overlay};

use crate::images::make_folder;

/// Longest side of an overlay, pixels: the few hundred or thousand values of a map have no detail for more.
const LONGEST_SIDE: u32 = 1024;

/// A folder of images with their novelty laid over them.
pub(crate) struct MapFolder {
    folder: PathBuf,
    scale: MapScale,
    /// Whether the detector saw the whole image, so that its map covers it; what it saw is shown otherwise.
    whole: bool,
    written: HashSet<PathBuf>,
}

impl MapFolder {
    pub(crate) fn make(folder: &Path, detector: &Detector) -> Result<Self> {
        make_folder(folder)?;
        Ok(Self {
            folder: folder.to_owned(),
            scale: detector.map_scale().clone(),
            whole: detector.config().resize_mode == ResizeMode::Squash
                && detector.preprocess().region.is_none(),
            written: HashSet::new(),
        })
    }

    /// Whether no map was written.
    pub(crate) fn is_empty(&self) -> bool {
        self.written.is_empty()
    }

    /// Writes the overlay of a finding; `inside` is its path within what was asked for.
    pub(crate) fn write(
        &mut self,
        inside: &Path,
        finding: &Finding,
        images: &Arc<dyn Dataset>,
        resized: &RgbImage,
    ) -> Result<()> {
        let Some(map) = &finding.novelty.map else {
            return Ok(());
        };
        let original = if self.whole {
            shrunk(images.image(finding.index)?)
        } else {
            resized.clone()
        };
        let path = self.free_path(inside);
        if let Some(parent) = path.parent() {
            make_folder(parent)?;
        }
        overlay(&original, map, &self.scale)
            .save(&path)
            .with_context(|| format!("cannot write the map {}", path.display()))
    }

    /// `a/b.jpg` becomes `a/b.jpg.png`, and a number tells images of one name apart.
    fn free_path(&mut self, inside: &Path) -> PathBuf {
        let inside: PathBuf = inside
            .components()
            .filter(|part| matches!(part, std::path::Component::Normal(_)))
            .collect();
        let name = inside.display();
        let mut path = self.folder.join(format!("{name}.png"));
        let mut number = 2;
        while !self.written.insert(path.clone()) {
            path = self.folder.join(format!("{name}.{number}.png"));
            number += 1;
        }
        path
    }
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
    fn images_of_one_name_get_maps_of_their_own() {
        let mut maps = MapFolder {
            folder: "maps".into(),
            scale: MapScale {
                usual: Vec::new(),
                span: 0.0,
            },
            whole: true,
            written: HashSet::new(),
        };
        assert_eq!(
            maps.free_path(Path::new("a/b.jpg")),
            Path::new("maps/a/b.jpg.png")
        );
        assert_eq!(
            maps.free_path(Path::new("a/b.jpg")),
            Path::new("maps/a/b.jpg.2.png")
        );
        assert_eq!(
            maps.free_path(Path::new("../b.jpg")),
            Path::new("maps/b.jpg.png")
        );
    }

    #[test]
    fn large_images_are_shrunk_and_strips_survive() {
        assert_eq!(shrunk(RgbImage::new(4096, 2048)).dimensions(), (1024, 512));
        assert_eq!(shrunk(RgbImage::new(1, 9000)).dimensions(), (1, 1024));
        assert_eq!(shrunk(RgbImage::new(30, 20)).dimensions(), (30, 20));
    }
}
