//! `defend report`: one page that needs nothing but itself.

mod histogram;
mod page;

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use defend_core::data::{Dataset, RgbImage, read_image};
use defend_core::{Detector, Maps, Novelty, Verdict, overlay};
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
    name: String,
    novelty: Novelty,
    /// The image and its map, as addresses with the content in them.
    image: String,
    map: Option<String>,
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
                Ok((finding, resized)) => {
                    content.add(
                        finding.name,
                        finding.novelty,
                        &dataset,
                        finding.index,
                        &resized,
                    )?;
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
    if arguments.show_normal {
        content.look_at_normal();
    }
    std::fs::write(&out, page::render(&content))
        .with_context(|| format!("cannot write {}", out.display()))?;
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
    fn add(
        &mut self,
        name: String,
        novelty: Novelty,
        images: &Arc<dyn Dataset>,
        index: usize,
        resized: &RgbImage,
    ) -> Result<()> {
        self.scores.push(novelty.score);
        self.novel += usize::from(novelty.verdict == Some(Verdict::Novel));
        // It may be gone by now.
        let image = images.image(index);
        let shown = fitted(image.as_ref().unwrap_or(resized), SIDE);
        let map = novelty.map.as_ref().map(|map| {
            // The map is of what the detector saw, which may be a part of the image.
            let seen = if sees_whole(self.detector) {
                shown.clone()
            } else {
                fitted(resized, SIDE)
            };
            let scale = self.detector.map_scale();
            address(&with_legend(&overlay(&seen, map, scale), scale.span))
        });
        self.entries.push(Entry {
            name,
            image: address(&shown)?,
            map: map.transpose()?,
            novelty,
        });
        Ok(())
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

    fn look_at_normal(&mut self) {
        for entry in &self.entries {
            let nearest = entry.novelty.explanation.iter().flat_map(|e| &e.nearest);
            for near in nearest.take(NEAREST) {
                // It may have moved since the fit.
                if !self.normal.contains_key(&near.name)
                    && let Ok(image) = read_image(Path::new(&near.name))
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
    let text = STANDARD.encode(bytes.into_inner());
    Ok(format!("data:image/jpeg;base64,{text}"))
}
