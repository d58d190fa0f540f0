//! From normal images to the closed form.

use std::collections::HashSet;
use std::sync::Arc;

use defend_data::ContentHash;
use defend_evidence::{ClosedForm, Embeddings, EvidenceConfig, KnownFaults};
use defend_nn::Rng;
use defend_vit::Encoder;

use crate::closed_form::ClosedFormStudent;
use crate::faults::Faulty;
use crate::fit::{Stages, stream};
use crate::fit_report::ClosedFormReport;
use crate::input::tiling_of;
use crate::normal_images::NormalImage;
use crate::normals::Normals;
use crate::observer::Observer;
use crate::tokens::TokenBlocks;
use crate::{Background, Error, MapScale, PatchMap};

/// How far above what is usual in the normal images a map's colour is full, as a multiple of their 99th percentile.
const HEADROOM: f32 = 2.0;

/// Images in tiles whose patches are looked at, however many tiles there are: fewer would leave no threshold.
const LEAST_TILED: usize = 64;

impl Stages<'_> {
    pub(crate) fn closed_form(
        &mut self,
        teacher: &Arc<dyn Encoder>,
        background: Option<&Background>,
        config: &EvidenceConfig,
        faulty: Option<&Faulty<'_>>,
    ) -> Result<(ClosedFormStudent, ClosedFormReport, MapScale), Error> {
        let tiling = tiling_of(teacher.spec(), &self.config);
        let blocks = TokenBlocks::of_encoder(&**teacher).in_tiles(tiling);
        let mut config = config.clone();
        // About as many tiles are kept in memory as images without tiles would be.
        if let Some(tiling) = tiling {
            let fewer = config.patches.images / tiling.count();
            config.patches.images = config.patches.images.min(fewer.max(LEAST_TILED));
        }
        let config = &config;
        let mut normals = Normals::new(&**teacher, &blocks, &self.images);
        let images = normals.embeddings(config.objects.images, self.observer)?;
        let fit = Fit {
            images: &images,
            names: &|image| self.images.name(image),
            hashes: &|image| self.images.hash(image),
            thumbnails: &|image| {
                self.thumbnails
                    .then(|| self.images.thumbnail(image))
                    .flatten()
            },
            background,
            normals: Some(&normals),
            faulty,
            config,
            seed: self.config.seed,
            drop_suspects: self.drop_suspects,
        };
        fit.learn(Arc::clone(teacher), blocks.clone(), self.observer)
    }
}

/// What a closed form is fitted from.
pub(crate) struct Fit<'a> {
    /// All images.
    pub(crate) images: &'a Embeddings,
    pub(crate) names: &'a dyn Fn(usize) -> String,
    /// Of the images as the network sees them, where that is known.
    pub(crate) hashes: &'a dyn Fn(usize) -> Option<ContentHash>,
    /// Small copies, where they are asked for.
    pub(crate) thumbnails: &'a dyn Fn(usize) -> Option<Vec<u8>>,
    pub(crate) background: Option<&'a Background>,
    /// Where patches come from; none for features that were taken before.
    pub(crate) normals: Option<&'a Normals<'a>>,
    /// Images whose faulty patches are learnt where patches count.
    pub(crate) faulty: Option<&'a Faulty<'a>>,
    pub(crate) config: &'a EvidenceConfig,
    pub(crate) seed: u64,
    pub(crate) drop_suspects: usize,
}

struct Learnt {
    evidence: ClosedForm,
    /// Number of each kept image among all.
    kept: Vec<usize>,
    /// Maps of some left-out images.
    maps: Vec<Vec<f32>>,
}

impl Fit<'_> {
    pub(crate) fn learn(
        &self,
        teacher: Arc<dyn Encoder>,
        blocks: TokenBlocks,
        observer: &mut dyn Observer,
    ) -> Result<(ClosedFormStudent, ClosedFormReport, MapScale), Error> {
        let ordinary = self.background.map(Background::embeddings).transpose()?;
        let mut used: Vec<usize> = (0..self.images.len()).collect();
        let mut dropped = Vec::new();
        let mut learnt = self.on(&used, ordinary.as_ref(), observer)?;
        if self.drop_suspects > 0 {
            let evidence = &learnt.evidence;
            let odd = evidence.images_of_suspects(self.images, self.drop_suspects)?;
            if odd.len() == self.images.len() {
                return Err(Error::Config {
                    field: "drop_suspects",
                    value: self.drop_suspects.to_string(),
                    expected: format!(
                        "fewer than the {} groups of images",
                        evidence.groups().len()
                    ),
                });
            }
            dropped = odd.iter().map(|&image| (self.names)(image)).collect();
            used.retain(|image| odd.binary_search(image).is_err());
            learnt = self.on(&used, ordinary.as_ref(), observer)?;
        }
        let Learnt {
            evidence,
            kept,
            maps,
        } = learnt;
        let grid = blocks.grid(&*teacher);
        let maps: Vec<PatchMap> = maps
            .into_iter()
            .map(|values| PatchMap { grid, values })
            .collect();
        let mut scale = MapScale::from_maps(&maps.iter().collect::<Vec<_>>(), HEADROOM);
        // Without any map there is nothing usual.
        scale.usual.resize(grid.patches(), 0.0);
        let report = ClosedFormReport {
            summary: *evidence.summary(),
            contrast_weight: evidence.contrast_weight(),
            patch_weight: evidence.patch_weight(),
            background: self.background.map(|b| b.source().to_owned()),
            dropped,
        };
        let whole: HashSet<usize> = kept.iter().copied().collect();
        let student = ClosedFormStudent {
            teacher,
            blocks,
            evidence,
            others: (used.iter())
                .filter(|image| !whole.contains(image))
                .filter_map(|&image| (self.hashes)(image))
                .collect(),
            normals: kept
                .iter()
                .map(|&image| NormalImage {
                    name: (self.names)(image),
                    hash: (self.hashes)(image),
                    thumbnail: (self.thumbnails)(image),
                })
                .collect(),
        };
        Ok((student, report, scale))
    }

    /// On those of the images that are `used`, ascending.
    fn on(
        &self,
        used: &[usize],
        ordinary: Option<&Embeddings>,
        observer: &mut dyn Observer,
    ) -> Result<Learnt, Error> {
        let mut evidence = ClosedForm::fit(&self.images.select(used), ordinary, self.config)?;
        let kept = evidence.kept().iter();
        let kept: Vec<usize> = kept.filter_map(|&i| used.get(i).copied()).collect();
        let wanted = evidence.patch_images().into_iter();
        let wanted: Vec<usize> = wanted.filter_map(|row| kept.get(row).copied()).collect();
        let mut distances = Vec::new();
        if !wanted.is_empty() {
            let normals = self.normals.ok_or_else(|| Error::Config {
                field: "features",
                value: "given".into(),
                expected: "the images: these are so alike that small parts decide, and features hold no patches; \
                           patches.weight = 0 does without them"
                    .into(),
            })?;
            let patches = normals.patches(&wanted, observer)?;
            distances =
                evidence.remember(&patches, &mut Rng::stream(self.seed, stream::PATCHES))?;
            if let Some(faulty) = self.faulty {
                let limit = self.config.patches.images;
                let (tokens, marked) =
                    faulty.look(normals.teacher(), normals.blocks(), limit, observer)?;
                let faults = KnownFaults {
                    tokens: &tokens,
                    marked: &marked,
                };
                distances = evidence.learn_faults(&patches, faults)?;
            }
        }
        let maps = match self.normals.and_then(Normals::places) {
            Some((looked_at, places)) if evidence.patch_share() < 1.0 => {
                let rows: Vec<usize> = (0..looked_at.len())
                    .filter(|&row| used.binary_search(&looked_at[row]).is_ok())
                    .collect();
                let images: Vec<usize> = rows.iter().map(|&row| looked_at[row]).collect();
                let places = places.select(&rows);
                let ordinary = self.background.map(Background::places).transpose()?;
                let objects = evidence.remember_objects(
                    &places,
                    &evidence.groups_of(&self.images.select(&images))?,
                    ordinary.flatten(),
                    &mut Rng::stream(self.seed, stream::PLACES),
                )?;
                // An image whose patches were not looked at has none that is broken.
                let whole = vec![0.0; places.patches()];
                let map = |(image, objects): (&usize, &Vec<f32>)| {
                    let place = wanted.iter().position(|wanted| wanted == image);
                    let distances = place.and_then(|place| distances.get(place));
                    evidence.map_of(Some(objects), distances.or(Some(&whole)))
                };
                images.iter().zip(&objects).filter_map(map).collect()
            }
            _ => {
                let maps = distances.iter();
                maps.filter_map(|distances| evidence.map_of(None, Some(distances)))
                    .collect()
            }
        };
        Ok(Learnt {
            evidence,
            kept,
            maps,
        })
    }
}
