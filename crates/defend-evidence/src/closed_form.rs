//! The three pieces of evidence, on one scale, and their sum.

use ndarray::{Array2, ArrayView2, Axis};
use serde::{Deserialize, Serialize};

use crate::contrast::{Contrast, unlike_normals};
use crate::groups::{kernel_width, leaders, nearest_leaders, similarity};
use crate::known::Known;
use crate::objects::ScaledObjects;
use crate::posterior::{ExactPosterior, Explained, LocalPosterior};
use crate::{Embeddings, Error, EvidenceConfig, Groups, PatchMemory, Standard};

/// Kernel width where the images have no scale of their own: fewer than two groups.
const LONE_WIDTH: f64 = 3.0;
/// Quantile of the left-out variances up to which an ordinary image counts as one that the posterior takes for normal.
const ACCEPTED: f64 = 0.95;
/// A background counts as at least this many images: of ten, a single one that happens to look normal is no share of 10 %.
const LEAST_BACKGROUND: usize = 250;
/// Nearest leaders that say how alike the images are.
const ALIKE_NEIGHBOURS: usize = 5;

/// What a fit found in the normal images, for reports.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Summary {
    /// Normal images that were given.
    pub images: usize,
    /// Those that differ from each other.
    pub distinct: usize,
    /// Groups of near copies among them.
    pub groups: usize,
    /// Whether the posterior is exact, and not given the nearest images alone.
    pub exact: bool,
    /// Images that the left-out values are from.
    pub left_out: usize,
    /// Kernel width of the posterior.
    pub width: f64,
    /// Ordinary images that were contrasted with; 0 without a background.
    pub background: usize,
    /// Share of them that the posterior takes for normal; of few images less, so that one of them is no large share.
    pub accepted: f64,
    /// Mean similarity of leaders to their nearest leaders.
    pub alike: f64,
}

#[derive(Debug, Clone)]
pub(crate) enum Posterior {
    Exact(ExactPosterior),
    Local(LocalPosterior),
}

impl Posterior {
    pub(crate) fn evaluate(&self, queries: ArrayView2<'_, f64>) -> Result<Vec<Explained>, Error> {
        match self {
            Self::Exact(exact) => Ok(exact.evaluate(queries)),
            Self::Local(local) => local.evaluate(queries),
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct WeighedContrast {
    pub(crate) contrast: Contrast,
    /// Kept normal images that it was fitted on.
    pub(crate) normal_rows: Vec<usize>,
    /// Ordinary images that it was fitted on.
    pub(crate) ordinary: Embeddings,
    /// Their places in the background; none for a form that was saved by an earlier version.
    pub(crate) ordinary_rows: Vec<usize>,
    pub(crate) scale: Standard,
    pub(crate) weight: f64,
}

#[derive(Debug, Clone)]
pub(crate) struct WeighedPatches {
    pub(crate) memory: PatchMemory,
    pub(crate) scale: Standard,
    /// Of the distances in maps; none for a form that was saved by an earlier version, whose maps are distances.
    pub(crate) map_scale: Option<Standard>,
}

/// The student in closed form: how novel an image is, from its embeddings and those of normal and of ordinary images.
///
/// ```
/// use defend_evidence::{ClosedForm, Embeddings, EvidenceConfig};
/// use ndarray::Array2;
///
/// // Forty normal items on a small arc, and two new ones: another on the arc and one far away.
/// let arc = |angles: &[f32]| {
///     let rows = Array2::from_shape_fn((angles.len(), 2), |(i, j)| if j == 0 { angles[i].cos() } else { angles[i].sin() });
///     Embeddings::new(vec![rows])
/// };
/// let angles: Vec<f32> = (0..40).map(|i| i as f32 * 0.02).collect();
/// let evidence = ClosedForm::fit(&arc(&angles)?, None, &EvidenceConfig::default())?;
/// let judged = evidence.evaluate(&arc(&[0.41, 2.5])?, None)?;
/// assert!(judged[1].score > judged[0].score);
/// # Ok::<(), defend_evidence::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ClosedForm {
    pub(crate) config: EvidenceConfig,
    pub(crate) summary: Summary,
    /// The kept images: all distinct ones, or the leaders of many.
    pub(crate) normal: Embeddings,
    pub(crate) groups: Groups,
    /// Number of each kept image among those given; empty once loaded.
    pub(crate) kept: Vec<usize>,
    pub(crate) posterior: Posterior,
    pub(crate) scale: Standard,
    pub(crate) contrast: Option<WeighedContrast>,
    pub(crate) patch_weight: f64,
    pub(crate) patches: Option<WeighedPatches>,
    pub(crate) objects: Option<ScaledObjects>,
    pub(crate) known: Option<Known>,
    /// The ordinary images that it was fitted beside.
    pub(crate) background: Option<Embeddings>,
    /// Kept images with left-out values, and their sums without patches; no sums once loaded.
    pub(crate) judged: Vec<usize>,
    pub(crate) sums: Vec<f64>,
    /// The sum's left-out values without known abnormal images, one a group.
    pub(crate) unaided: Vec<f64>,
    pub(crate) left_out: Vec<f64>,
}

impl ClosedForm {
    /// Learns what is normal, and what images look like in general where a background is given.
    ///
    /// Images with equal embeddings count once, and neither their order nor that of the background matters. Where
    /// [`ClosedForm::patch_weight`] is not zero, patches should count too: see [`ClosedForm::remember`].
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Empty`], [`Error::Shape`] for a background of other widths.
    pub fn fit(
        normal: &Embeddings,
        background: Option<&Embeddings>,
        config: &EvidenceConfig,
    ) -> Result<Self, Error> {
        config.validate()?;
        if normal.is_empty() {
            return Err(Error::Empty {
                what: "normal embeddings",
            });
        }
        if let Some(background) = background {
            normal.check_widths(background, "the background")?;
        }
        let images = normal.len();
        let mut kept = distinct(normal);
        let (distinct_images, mut normal) = (kept.len(), normal.select(&kept));
        let mut x = normal.phi(config.posterior.first_part);
        let mut groups = leaders(x.view(), config.group_share);
        if kept.len() > config.posterior.exact_images {
            // Copies say nothing more and would take the places of the nearest images.
            let leaders = std::mem::take(&mut groups.leaders);
            kept = leaders.iter().map(|&row| kept[row]).collect();
            normal = normal.select(&leaders);
            x = x.select(Axis(0), &leaders);
            groups = Groups::single(leaders.len());
        }
        let nearest = nearest_leaders(x.view(), &groups, ALIKE_NEIGHBOURS);
        let width = kernel_width(&nearest, config.posterior.width).unwrap_or(LONE_WIDTH);
        // The weight of patches is chosen for parts that weigh the same.
        let plain = normal.features(usize::MAX);
        let alike = similarity(&nearest_leaders(plain.view(), &groups, ALIKE_NEIGHBOURS));
        let judged = judged_rows(kept.len(), config.posterior.exact_images);
        let posterior = posterior(x, &groups, width, config)?;
        let left_out = match &posterior {
            Posterior::Exact(exact) => exact
                .left_out(&groups, config.posterior.ridge)?
                .unwrap_or_default(),
            Posterior::Local(local) => local.left_out(&judged)?,
        };
        let judged = if left_out.is_empty() {
            Vec::new()
        } else {
            judged
        };
        let mut form = Self {
            summary: Summary {
                images,
                distinct: distinct_images,
                groups: groups.len(),
                exact: matches!(posterior, Posterior::Exact(_)),
                left_out: judged.len(),
                width,
                background: 0,
                accepted: 0.0,
                alike,
            },
            config: config.clone(),
            normal,
            groups,
            kept,
            posterior,
            scale: Standard::from_values(&left_out),
            contrast: None,
            patch_weight: patch_weight(alike, config),
            patches: None,
            objects: None,
            known: None,
            background: None,
            sums: Vec::new(),
            judged,
            unaided: Vec::new(),
            left_out: Vec::new(),
        };
        form.sums = left_out.iter().map(|value| form.scale.z(*value)).collect();
        if let (Some(background), true) = (background, config.contrast.enabled) {
            form.contrast_with(background, &left_out)?;
        }
        form.unaided = form.one_a_group(&form.sums, &form.judged);
        form.settle();
        Ok(form)
    }

    fn contrast_with(&mut self, background: &Embeddings, left_out: &[f64]) -> Result<(), Error> {
        let config = self.config.contrast;
        let background = background.select(&distinct(background));
        self.summary.background = background.len();
        self.background = Some(background.clone());
        if left_out.is_empty() || background.is_empty() {
            return Ok(());
        }
        let limit = quantile(left_out, ACCEPTED);
        let judged = self
            .posterior
            .evaluate(background.phi(self.config.posterior.first_part).view())?;
        let accepted = judged.iter().filter(|e| e.log_variance < limit).count();
        self.summary.accepted = accepted as f64 / background.len().max(LEAST_BACKGROUND) as f64;
        let weight = config.weight * (self.summary.accepted / config.full_share).min(1.0);
        if weight == 0.0 {
            return Ok(());
        }
        let normal = self.normal.select(&self.judged).features(config.parts);
        let groups = within(&self.groups, &self.judged);
        let ordinary = background.features(config.parts);
        let unlike = unlike_normals(normal.view(), ordinary.view(), config.dropped);
        if unlike.is_empty() {
            return Ok(());
        }
        let ordinary = ordinary.select(Axis(0), &unlike);
        let (contrast, values) = Contrast::fit(
            normal.view(),
            &groups,
            ordinary.view(),
            None,
            config.width,
            config.ridge,
        )?;
        let scale = Standard::from_values(&values.normal);
        for (sum, value) in self.sums.iter_mut().zip(values.normal) {
            *sum += weight * scale.z(value);
        }
        self.contrast = Some(WeighedContrast {
            contrast,
            normal_rows: self.judged.clone(),
            ordinary: background.select(&unlike),
            ordinary_rows: unlike,
            scale,
            weight,
        });
        Ok(())
    }

    /// Numbers, among the images given, of those that are kept; empty for a form that was loaded.
    pub fn kept(&self) -> &[usize] {
        &self.kept
    }

    /// The kept images by groups of near copies.
    pub fn groups(&self) -> &Groups {
        &self.groups
    }

    /// Groups of near copies among other images, by the rule of the fit.
    ///
    /// # Errors
    /// [`Error::Shape`] for embeddings of other widths.
    pub fn near_copies(&self, images: &Embeddings) -> Result<Groups, Error> {
        images.check_widths(&self.normal, "the normal images")?;
        let rows = images.phi(self.config.posterior.first_part);
        Ok(leaders(rows.view(), self.config.group_share))
    }

    /// The first of some images whose embedding is that of a normal image of the fit.
    ///
    /// # Errors
    /// [`Error::Shape`] for embeddings of other widths.
    pub fn first_known(&self, images: &Embeddings) -> Result<Option<usize>, Error> {
        images.check_widths(&self.normal, "the normal images")?;
        first_equal(images, &self.normal)
    }

    /// What the fit found.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// The settings.
    pub fn config(&self) -> &EvidenceConfig {
        &self.config
    }

    /// Weight of the patches in the sum once they are remembered; above 0 where normal images are so alike that small parts
    /// decide.
    pub fn patch_weight(&self) -> f64 {
        self.patch_weight
    }

    /// Weight of the contrast in the sum.
    pub fn contrast_weight(&self) -> f64 {
        self.contrast
            .as_ref()
            .map_or(0.0, |contrast| contrast.weight)
    }

    /// Channels of each part of the embeddings.
    pub fn widths(&self) -> Vec<usize> {
        self.normal.widths()
    }

    /// The patch memory, once there is one.
    pub fn memory(&self) -> Option<&PatchMemory> {
        self.patches.as_ref().map(|patches| &patches.memory)
    }

    /// The sum's left-out values, one for each group that has one: what normal images score that were not learnt.
    pub fn left_out(&self) -> &[f64] {
        &self.left_out
    }

    /// The kept image of each left-out value.
    pub(crate) fn left_out_images(&self) -> Vec<usize> {
        let images = if self.patch_weight > 0.0 && self.patches.is_some() {
            self.patch_images()
        } else {
            self.judged.clone()
        };
        self.one_a_group(&images, &images)
    }

    /// Kept images with left-out values, all of them where there are none.
    pub(crate) fn judged(&self) -> Vec<usize> {
        if self.judged.is_empty() {
            (0..self.normal.len()).collect()
        } else {
            self.judged.clone()
        }
    }

    /// What explains kept images when their own groups are left out: leaders with their share, largest first.
    pub(crate) fn explained_by_others(
        &self,
        rows: &[usize],
    ) -> Result<Vec<Vec<(usize, f64)>>, Error> {
        let shares = match &self.posterior {
            Posterior::Exact(exact) => exact.left_out_shares(&self.groups, rows)?,
            Posterior::Local(local) => local.left_out_shares(rows)?,
        };
        let leader = |(group, share)| Some((*self.groups.leaders.get(group)?, share));
        let named = |shares: Vec<(usize, f64)>| shares.into_iter().filter_map(leader).collect();
        Ok(shares.into_iter().map(named).collect())
    }

    /// Brings the left-out values up to date.
    pub(crate) fn settle(&mut self) {
        self.left_out.clone_from(&self.unaided);
        let Some(known) = &self.known else {
            return;
        };
        let images = self.left_out_images();
        for (value, image) in self.left_out.iter_mut().zip(images) {
            *value += known.of_normal(image, self.config.known);
        }
    }

    /// A form from what was saved of one.
    pub(crate) fn restore(
        config: EvidenceConfig,
        summary: Summary,
        (normal, groups): (Embeddings, Groups),
        scale: Standard,
        patch_weight: f64,
        unaided: Vec<f64>,
    ) -> Result<Self, Error> {
        let judged = if summary.left_out == 0 {
            Vec::new()
        } else {
            judged_rows(normal.len(), config.posterior.exact_images)
        };
        Ok(Self {
            posterior: posterior(
                normal.phi(config.posterior.first_part),
                &groups,
                summary.width,
                &config,
            )?,
            config,
            summary,
            normal,
            groups,
            kept: Vec::new(),
            scale,
            contrast: None,
            patch_weight,
            patches: None,
            objects: None,
            known: None,
            background: None,
            judged,
            sums: Vec::new(),
            left_out: Vec::new(),
            unaided,
        })
    }
}

fn posterior(
    x: Array2<f64>,
    groups: &Groups,
    width: f64,
    config: &EvidenceConfig,
) -> Result<Posterior, Error> {
    let settings = config.posterior;
    Ok(if x.nrows() <= settings.exact_images {
        Posterior::Exact(ExactPosterior::fit(x, groups, width, settings.ridge)?)
    } else {
        Posterior::Local(LocalPosterior::fit(
            x,
            width,
            settings.ridge,
            settings.neighbours,
        ))
    })
}

fn patch_weight(alike: f64, config: &EvidenceConfig) -> f64 {
    let settings = config.patches;
    settings.weight * ((alike - settings.alike_from) / settings.alike_over).clamp(0.0, 1.0)
}

/// The first of some images whose values are those of one of the others.
pub(crate) fn first_equal(
    images: &Embeddings,
    others: &Embeddings,
) -> Result<Option<usize>, Error> {
    let all = Embeddings::joined(&[images.clone(), others.clone()])?;
    let order = all.by_value();
    let runs = order.chunk_by(|a, b| all.compare(*a, *b).is_eq());
    let of_both = runs.filter_map(|run| {
        let image = *run.iter().min()?;
        (image < images.len() && *run.iter().max()? >= images.len()).then_some(image)
    });
    Ok(of_both.min())
}

/// Numbers of images of which no two are equal, in an order that depends on their values alone.
pub(crate) fn distinct(images: &Embeddings) -> Vec<usize> {
    let mut order = images.by_value();
    order.dedup_by(|a, b| images.compare(*a, *b).is_eq());
    order
}

/// Rows that get left-out values: all, or of more than are judged exactly half as many, evenly spread.
fn judged_rows(rows: usize, exact: usize) -> Vec<usize> {
    let all: Vec<usize> = (0..rows).collect();
    if rows <= exact {
        all
    } else {
        spread(&all, exact.div_ceil(2))
    }
}

/// At most `count` of some numbers, evenly spread.
pub(crate) fn spread(numbers: &[usize], count: usize) -> Vec<usize> {
    let total = numbers.len();
    if total <= count {
        return numbers.to_vec();
    }
    (0..count).map(|i| numbers[i * total / count]).collect()
}

/// The groups of some rows, ascending.
pub(crate) fn within(groups: &Groups, rows: &[usize]) -> Groups {
    let mut number = vec![usize::MAX; groups.len()];
    let mut some = Groups {
        leaders: Vec::new(),
        of: Vec::with_capacity(rows.len()),
    };
    for (i, &row) in rows.iter().enumerate() {
        let number = &mut number[groups.of[row]];
        if *number == usize::MAX {
            *number = some.leaders.len();
            some.leaders.push(i);
        }
        some.of.push(*number);
    }
    some
}

/// Quantile with linear interpolation; values are not empty.
fn quantile(values: &[f64], share: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let at = share * (values.len() - 1) as f64;
    let (low, rest) = (at.floor() as usize, at.fract());
    let high = (low + 1).min(values.len() - 1);
    values[low] + (values[high] - values[low]) * rest
}
