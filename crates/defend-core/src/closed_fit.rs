//! From normal images to the closed form.

use std::sync::Arc;

use defend_evidence::{ClosedForm, Embeddings, EvidenceConfig};
use defend_nn::Rng;
use defend_vit::Encoder;

use crate::closed_form::ClosedFormStudent;
use crate::fit::{ClosedFormReport, Stages, stream};
use crate::normals::Normals;
use crate::observer::Observer;
use crate::tokens::TokenBlocks;
use crate::{Background, Error, MapScale, PatchMap};

/// How far above what is usual in the normal images a map's colour is full, as a multiple of their 99th percentile.
const HEADROOM: f32 = 2.0;

impl Stages<'_> {
    pub(crate) fn closed_form(
        &mut self,
        teacher: Arc<dyn Encoder>,
        background: Option<&Background>,
        config: &EvidenceConfig,
    ) -> Result<(ClosedFormStudent, ClosedFormReport, MapScale), Error> {
        let blocks = TokenBlocks::of(teacher.spec().architecture.depth);
        let mut normals = Normals::new(&*teacher, &blocks, &self.pictures);
        let images = normals.embeddings(config.objects.images, self.observer)?;
        let ordinary = background.map(Background::embeddings).transpose()?;
        let fit = Fit {
            images: &images,
            ordinary: ordinary.as_ref(),
            background,
            normals: &normals,
            config,
            seed: self.config.seed,
        };
        let mut used: Vec<usize> = (0..images.len()).collect();
        let mut dropped = Vec::new();
        let mut learnt = fit.on(&used, self.observer)?;
        if self.drop_suspects > 0 {
            let odd = (learnt.evidence).images_of_suspects(&images, self.drop_suspects)?;
            if odd.len() == images.len() {
                return Err(Error::Config {
                    field: "drop_suspects",
                    value: self.drop_suspects.to_string(),
                    expected: format!(
                        "fewer than the {} groups of images",
                        learnt.evidence.groups().len()
                    ),
                });
            }
            dropped = odd.iter().map(|&i| self.pictures.name(i)).collect();
            used.retain(|image| odd.binary_search(image).is_err());
            learnt = fit.on(&used, self.observer)?;
        }
        let Learnt {
            evidence,
            kept,
            maps,
        } = learnt;
        let grid = teacher.spec().architecture.grid();
        let maps: Vec<PatchMap> = maps
            .into_iter()
            .map(|values| PatchMap { grid, values })
            .collect();
        let scale = MapScale::of(&maps.iter().collect::<Vec<_>>(), HEADROOM);
        let names = kept.iter().map(|&i| self.pictures.name(i)).collect();
        let report = ClosedFormReport {
            summary: *evidence.summary(),
            contrast_weight: evidence.contrast_weight(),
            patch_weight: evidence.patch_weight(),
            background: background.map(|background| background.source().to_owned()),
            dropped,
        };
        let student = ClosedFormStudent {
            teacher,
            blocks,
            evidence,
            names,
        };
        Ok((student, report, scale))
    }
}

/// What a closed form is fitted from.
struct Fit<'a> {
    /// All images.
    images: &'a Embeddings,
    ordinary: Option<&'a Embeddings>,
    background: Option<&'a Background>,
    normals: &'a Normals<'a>,
    config: &'a EvidenceConfig,
    seed: u64,
}

struct Learnt {
    evidence: ClosedForm,
    /// Number of each kept image among all.
    kept: Vec<usize>,
    /// Maps of some left-out images.
    maps: Vec<Vec<f32>>,
}

impl Fit<'_> {
    /// On those of the images that are `used`, ascending.
    fn on(&self, used: &[usize], observer: &mut dyn Observer) -> Result<Learnt, Error> {
        let mut evidence = ClosedForm::fit(&self.images.select(used), self.ordinary, self.config)?;
        let kept = evidence.kept().iter();
        let kept: Vec<usize> = kept.filter_map(|&i| used.get(i).copied()).collect();
        let wanted = evidence.patch_images().into_iter();
        let wanted: Vec<usize> = wanted.filter_map(|row| kept.get(row).copied()).collect();
        let mut distances = Vec::new();
        if !wanted.is_empty() {
            let patches = self.normals.patches(&wanted, observer)?;
            distances =
                evidence.remember(&patches, &mut Rng::stream(self.seed, stream::PATCHES))?;
        }
        let maps = match self.normals.places() {
            Some((looked_at, places)) if evidence.patch_share() < 1.0 => {
                let rows: Vec<usize> = (0..looked_at.len())
                    .filter(|&row| used.binary_search(&looked_at[row]).is_ok())
                    .collect();
                let images: Vec<usize> = rows.iter().map(|&row| looked_at[row]).collect();
                let places = places.select(&rows);
                let objects = evidence.remember_objects(
                    &places,
                    &groups_of(&evidence, &kept, &images),
                    self.background.and_then(Background::places),
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

/// The group of each of some images; numbers of their own, beyond those of the groups, for images that are not kept.
fn groups_of(evidence: &ClosedForm, kept: &[usize], images: &[usize]) -> Vec<usize> {
    let groups = evidence.groups();
    let group = |(place, image): (usize, &usize)| {
        let row = kept.iter().position(|kept| kept == image);
        row.and_then(|row| groups.of.get(row).copied())
            .unwrap_or(groups.len() + place)
    };
    images.iter().enumerate().map(group).collect()
}
