//! `defend report`: one page that needs nothing but itself.

mod histogram;
mod page;

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use defend_core::data::{Dataset, RgbImage, read_image_at_least};
use defend_core::{Detector, Finding, Maps, Novelty, NoveltyDetector, Verdict, overlay};
use image::DynamicImage;
use image::codecs::jpeg::JpegEncoder;
use image::imageops::FilterType;

use crate::arguments::Report;
use crate::exit::Exit;
use crate::images::{check_writable, find, scan_all};
use crate::maps::{sees_whole, with_legend};
use crate::progress::Progress;
use crate::say::say;

/// Longest side of an image on the page, pixels.
const SIDE: u32 = 256;
/// Longest side of a nearest normal image.
const SMALL_SIDE: u32 = 96;
/// Quality of the images on the page.
const QUALITY: u8 = 85;
/// Nearest normal images of each.
const NEAREST: usize = 3;

/// An image of the page.
struct Entry {
    /// Position among the images.
    index: usize,
    name: String,
    novelty: Novelty,
}

/// What the page shows.
struct Content<'a> {
    detector: &'a Detector,
    model: String,
    /// Most novel first.
    entries: Vec<Entry>,
    scores: Vec<f64>,
    novel: usize,
    unreadable: Vec<(String, String)>,
    /// Nearest normal images by name, as addresses.
    normal: BTreeMap<String, String>,
}

pub(crate) fn run(arguments: &Report) -> Result<Exit> {
    let detector = arguments.common.load(&arguments.model)?;
    let found = find(&arguments.paths, arguments.common.strict, None)?;
    let out = check_writable(&arguments.out, &found.paths)?;
    let mut content = Content {
        detector: &detector,
        model: arguments.model.display().to_string(),
        entries: Vec::new(),
        scores: Vec::new(),
        novel: 0,
        unreadable: Vec::new(),
        normal: BTreeMap::new(),
    };
    let dataset = found.dataset();
    scan_all(
        &detector,
        &dataset,
        Maps::Wanted,
        arguments.common.max_unreadable(),
        &mut Progress::new(),
        &mut |outcome| {
            match outcome {
                Ok((finding, _)) => {
                    content.add(finding);
                    content.keep(arguments.most);
                }
                Err(failure) => content
                    .unreadable
                    .push((failure.name, failure.error.to_string())),
            }
            Ok(())
        },
    )?;
    content.sort();
    content.entries.truncate(arguments.most);
    content.look_at_normal(arguments.show_normal);
    let page = page::render(&content, &dataset)?;
    defend_files::write(&out, page.as_bytes())?;
    say!(
        "wrote {}: {} images, {} novel",
        out.display(),
        content.scores.len(),
        content.novel
    );
    Ok(Exit {
        novel: content.novel > 0,
        unreadable: !content.unreadable.is_empty(),
    })
}

impl Content<'_> {
    fn add(&mut self, finding: Finding) {
        let Finding {
            index,
            name,
            novelty,
        } = finding;
        self.scores.push(novelty.score);
        self.novel += usize::from(novelty.verdict == Some(Verdict::Novel));
        self.entries.push(Entry {
            index,
            name,
            novelty,
        });
    }

    /// An image and its map, as addresses with the content in them; none of what can no longer be read.
    fn pictures(&self, entry: &Entry, images: &Arc<dyn Dataset>) -> Result<Vec<String>> {
        let Ok(image) = images.image_at_least(entry.index, [SIDE; 2]) else {
            return Ok(Vec::new());
        };
        let shown = fitted(&image, SIDE);
        let mut pictures = vec![address(&shown)?];
        if let Some(map) = &entry.novelty.map {
            // The map is of what the detector saw, which may be a part of the image.
            let seen = if sees_whole(self.detector) {
                shown
            } else {
                let preprocess = self.detector.preprocess();
                let Ok(seen) = preprocess.read(&**images, entry.index) else {
                    return Ok(pictures);
                };
                fitted(&seen, SIDE)
            };
            let scale = self.detector.map_scale();
            pictures.push(address(&with_legend(
                &overlay(&seen, map, scale),
                scale.span,
            ))?);
        }
        Ok(pictures)
    }

    /// Forgets what will not be shown, now and then: memory does not grow with the images.
    fn keep(&mut self, most: usize) {
        if self.entries.len() >= most.max(32).saturating_mul(2) {
            self.sort();
            self.entries.truncate(most);
        }
    }

    fn sort(&mut self) {
        let score = |entry: &Entry| entry.novelty.score;
        self.entries.sort_by(|a, b| {
            score(b)
                .total_cmp(&score(a))
                .then_with(|| a.name.cmp(&b.name))
        });
    }

    /// Small copies of the nearest normal images: those in the model, and with `from_files` those where the fit found them.
    fn look_at_normal(&mut self, from_files: bool) {
        for entry in &self.entries {
            let nearest = entry.novelty.explanation.iter().flat_map(|e| &e.nearest);
            for near in nearest.take(NEAREST) {
                if self.normal.contains_key(&near.name) {
                    continue;
                }
                if let Some(copy) = self.detector.thumbnail(&near.name) {
                    self.normal.insert(near.name.clone(), address_of(copy));
                } else if from_files
                    // It may have moved since the fit.
                    && let Ok(image) = read_image_at_least(Path::new(&near.name), [SMALL_SIDE; 2])
                    && let Ok(address) = address(&fitted(&image, SMALL_SIDE))
                {
                    self.normal.insert(near.name.clone(), address);
                }
            }
        }
    }
}

/// The image, no side longer than `side`.
fn fitted(image: &RgbImage, side: u32) -> RgbImage {
    if image.width().max(image.height()) <= side {
        return image.clone();
    }
    let image = DynamicImage::ImageRgb8(image.clone());
    image.resize(side, side, FilterType::Triangle).into_rgb8()
}

/// An address that holds the image.
fn address(image: &RgbImage) -> Result<String> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_with_encoder(JpegEncoder::new_with_quality(&mut bytes, QUALITY))?;
    Ok(address_of(&bytes.into_inner()))
}

/// An address that holds a JPEG.
fn address_of(jpeg: &[u8]) -> String {
    format!("data:image/jpeg;base64,{}", STANDARD.encode(jpeg))
}
