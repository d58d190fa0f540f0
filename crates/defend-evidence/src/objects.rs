//! Which object is the novel one? How usual the surroundings of each patch are among normal images, and among ordinary ones.

use defend_random::Rng;
use ndarray::{Array2, ArrayView2, Axis, s};
use rand::seq::index::sample;
use rayon::prelude::*;

use crate::linear::{exp_of_negative, most_similar, product, vectorised};
use crate::{
    ClosedForm, CoreSet, Embeddings, Error, Judgement, PatchMemory, PatchTokens, Standard,
};

/// Densities are not taken to be less before the logarithm.
const LEAST_DENSITY: f64 = 1e-30;

/// Tokens of places in normal and in ordinary images.
///
/// The value of a place is `weight log p_ordinary - log p_normal`, each density a mean of Gaussian kernels: with the weight 1 what
/// is more like images in general than like normal ones, with 0 what is unlike anything in normal images.
#[derive(Debug, Clone, PartialEq)]
pub struct ObjectMemory {
    normal: CoreSet,
    ordinary: Option<Array2<f32>>,
    width: f64,
}

impl ObjectMemory {
    /// From unit rows; `width` of the kernel.
    pub fn new(normal: CoreSet, ordinary: Option<Array2<f32>>, width: f64) -> Self {
        Self {
            normal,
            ordinary,
            width,
        }
    }

    /// A seeded sample of at most `count` places; `groups`: of each image.
    fn choose(
        places: &PatchTokens,
        groups: &[usize],
        ordinary: Option<Array2<f32>>,
        (count, width): (usize, f64),
        rng: &mut Rng,
    ) -> Self {
        let (images, of_image) = (places.len(), places.patches());
        let total = images * of_image;
        let mut chosen = sample(rng, total, count.min(total)).into_vec();
        chosen.sort_unstable();
        let channels = places.blocks().first().map_or(0, |b| b.len_of(Axis(2)));
        let mut patches = Array2::zeros((chosen.len(), channels));
        if let Some(block) = places.blocks().first() {
            for (mut target, &i) in patches.rows_mut().into_iter().zip(&chosen) {
                target.assign(&block.slice(s![i / of_image, i % of_image, ..]));
            }
        }
        let groups = chosen
            .iter()
            .filter_map(|i| groups.get(i / of_image).copied())
            .collect();
        Self::new(CoreSet { patches, groups }, ordinary, width)
    }

    /// The places of normal images.
    pub fn normal(&self) -> &CoreSet {
        &self.normal
    }

    /// The places of ordinary images.
    pub fn ordinary(&self) -> Option<&Array2<f32>> {
        self.ordinary.as_ref()
    }

    /// The same with some of the normal places, under other groups.
    pub(crate) fn with_normal(&self, normal: CoreSet) -> Self {
        Self::new(normal, self.ordinary.clone(), self.width)
    }

    /// Values of unit rows `[places, channels]`, larger for more novel; `own`: the group whose places are not looked at. All 0 where
    /// there is no normal place to compare with.
    pub fn values(&self, places: ArrayView2<'_, f32>, weight: f64, own: Option<usize>) -> Vec<f32> {
        let among_normal = self.log_density(places, &self.normal.patches, |row| {
            own.is_some_and(|own| self.normal.groups.get(row) == Some(&own))
        });
        let Some(among_normal) = among_normal else {
            return vec![0.0; places.nrows()];
        };
        let among_ordinary = match &self.ordinary {
            Some(ordinary) if weight > 0.0 => self.log_density(places, ordinary, |_| false),
            _ => None,
        };
        let among_ordinary = among_ordinary.unwrap_or_else(|| vec![0.0; places.nrows()]);
        let pairs = among_normal.iter().zip(among_ordinary);
        pairs
            .map(|(normal, ordinary)| (weight * ordinary - normal) as f32)
            .collect()
    }

    /// Logarithm of the mean kernel between each place and the rows of `known` that are not left out; `None` without any.
    fn log_density(
        &self,
        places: ArrayView2<'_, f32>,
        known: &Array2<f32>,
        left_out: impl Fn(usize) -> bool,
    ) -> Option<Vec<f64>> {
        let weights: Vec<f32> = (0..known.nrows())
            .map(|row| if left_out(row) { 0.0 } else { 1.0 })
            .collect();
        let count = weights.iter().filter(|weight| **weight > 0.0).count();
        if count == 0 {
            return None;
        }
        // exp(-width |x - y|^2) = exp(2 width (x.y - 1)) of unit rows.
        let factor = (2.0 * self.width) as f32;
        let similarities = product(places, known.view());
        let of_place = similarities.rows().into_iter().map(|row| {
            let sum = row.as_slice().map_or(0.0, |row| {
                vectorised(
                    #[inline(always)]
                    || kernels(row, &weights, factor),
                )
            });
            (f64::from(sum) / count as f64).max(LEAST_DENSITY).ln()
        });
        Some(of_place.collect())
    }

    /// The scale of values: of the normal places themselves, each with its image's group left out; `None` for a single group, of
    /// which nothing would be left.
    fn scale(&self, weight: f64) -> Option<Standard> {
        let mut groups = self.normal.groups.clone();
        groups.sort_unstable();
        groups.dedup();
        if groups.len() < 2 {
            return None;
        }
        let of_group = |group: &usize| {
            let rows = (0..self.normal.groups.len()).filter(|&i| self.normal.groups[i] == *group);
            let rows = self
                .normal
                .patches
                .select(Axis(0), &rows.collect::<Vec<_>>());
            self.values(rows.view(), weight, Some(*group))
        };
        let values: Vec<Vec<f32>> = groups.par_iter().map(of_group).collect();
        let values: Vec<f64> = values.concat().into_iter().map(f64::from).collect();
        Some(Standard::from_values(&values))
    }
}

/// Sum of weighed `exp(factor (similarity - 1))`, lane by lane: the compiler keeps the order of a single sum.
#[inline(always)]
fn kernels(similarities: &[f32], weights: &[f32], factor: f32) -> f32 {
    const LANES: usize = 32;
    let mut lanes = [0f32; LANES];
    let (values, rest) = similarities.as_chunks::<LANES>();
    let (weights, of_rest) = weights.as_chunks::<LANES>();
    for (values, weights) in values.iter().zip(weights) {
        for ((lane, value), weight) in lanes.iter_mut().zip(values).zip(weights) {
            *lane += weight * exp_of_negative(factor * (value - 1.0));
        }
    }
    for ((lane, value), weight) in lanes.iter_mut().zip(rest).zip(of_rest) {
        *lane += weight * exp_of_negative(factor * (value - 1.0));
    }
    lanes.iter().sum()
}

/// What maps of objects are made of.
#[derive(Debug, Clone)]
pub(crate) struct ScaledObjects {
    pub(crate) memory: ObjectMemory,
    pub(crate) scale: Standard,
}

impl ClosedForm {
    /// Share of the patch distances in a map, in `0..=1`, as they count in the score; the rest is the map of objects.
    pub fn patch_share(&self) -> f64 {
        match &self.patches {
            // As earlier versions saved it: distances alone.
            Some(patches) if patches.map_scale.is_none() => 1.0,
            _ if self.config.patches.weight > 0.0 => {
                (self.patch_weight / self.config.patches.weight).min(1.0)
            }
            _ => 0.0,
        }
    }

    /// Chooses the object memory from places of some normal images (one block; the surroundings of each patch) and from unit rows
    /// of ordinary images; returns the values that the normal images' places have when their groups are left out, in standard
    /// deviations. `groups`: of each image, as [`ClosedForm::groups_of`] has them. From a single group nothing is remembered: it
    /// has no left-out values, and so no scale.
    ///
    /// # Errors
    /// [`Error::Shape`] for places of another number of images or other widths.
    pub fn remember_objects(
        &mut self,
        places: &PatchTokens,
        groups: &[usize],
        ordinary: Option<Array2<f32>>,
        rng: &mut Rng,
    ) -> Result<Vec<Vec<f32>>, Error> {
        if places.len() != groups.len() || places.blocks().len() != 1 {
            return Err(Error::Shape {
                what: "places (blocks, images, places)".into(),
                found: vec![places.blocks().len(), places.len(), places.patches()],
                expected: vec![1, groups.len(), places.patches()],
            });
        }
        let width = places.blocks().first().map(|block| block.len_of(Axis(2)));
        if let (Some(ordinary), Some(width)) = (&ordinary, width)
            && ordinary.ncols() != width
        {
            return Err(Error::Shape {
                what: "places of ordinary images".into(),
                found: ordinary.shape().to_vec(),
                expected: vec![ordinary.nrows(), width],
            });
        }
        let settings = self.config.objects;
        let memory = ObjectMemory::choose(
            places,
            groups,
            ordinary,
            (settings.places, settings.width),
            rng,
        );
        self.set_objects(memory);
        self.object_values(places, Some(groups))
    }

    /// Takes an object memory, with the scale that its own places give; none where they give none.
    pub(crate) fn set_objects(&mut self, memory: ObjectMemory) {
        let scale = memory.scale(self.ordinary_share());
        self.objects = scale.map(|scale| ScaledObjects { memory, scale });
    }

    /// The group of each of some images, kept or not: of the nearest leader.
    ///
    /// # Errors
    /// [`Error::Shape`] for other widths.
    pub fn groups_of(&self, images: &Embeddings) -> Result<Vec<usize>, Error> {
        self.normal.check_widths(images, "the embeddings")?;
        let first = self.config.posterior.first_part;
        let leaders = self.normal.select(&self.groups.leaders).phi(first);
        let mut groups = Vec::with_capacity(images.len());
        for some in images.batches() {
            groups.extend(most_similar(some.phi(first).view(), leaders.view()));
        }
        Ok(groups)
    }

    /// The object memory, once there is one.
    pub fn objects(&self) -> Option<&ObjectMemory> {
        self.objects.as_ref().map(|objects| &objects.memory)
    }

    /// How much ordinary images count in maps, in `0..=1`, as in the score.
    fn ordinary_share(&self) -> f64 {
        let whole = self.config.contrast.weight;
        if whole > 0.0 {
            (self.contrast_weight() / whole).min(1.0)
        } else {
            0.0
        }
    }

    /// Values of places in standard deviations, empty without an object memory; `groups` of the images to leave them out.
    fn object_values(
        &self,
        places: &PatchTokens,
        groups: Option<&[usize]>,
    ) -> Result<Vec<Vec<f32>>, Error> {
        let (Some(ScaledObjects { memory, scale }), [tokens]) = (&self.objects, places.blocks())
        else {
            return Ok(Vec::new());
        };
        let (found, expected) = (tokens.len_of(Axis(2)), memory.normal.patches.ncols());
        if found != expected {
            return Err(Error::Shape {
                what: "channels of the places".into(),
                found: vec![found],
                expected: vec![expected],
            });
        }
        let weight = self.ordinary_share();
        let one = |image: usize| {
            let own = groups.and_then(|groups| groups.get(image).copied());
            let values = memory.values(tokens.index_axis(Axis(0), image), weight, own);
            let z = |value: f32| scale.z(f64::from(value)) as f32;
            values.into_iter().map(z).collect()
        };
        Ok((0..places.len()).into_par_iter().map(one).collect())
    }

    /// Maps of judged images: a value for each patch, in standard deviations above the mean of what normal images get when they are
    /// left out. What is broken and which object is novel are added by [`ClosedForm::patch_share`].
    ///
    /// `places` of the same images, as [`ClosedForm::remember_objects`] took them, are needed where that share is below 1; patch
    /// tokens must have been given to [`ClosedForm::evaluate`] where it is above 0. `None` where what is needed is not there.
    ///
    /// # Errors
    /// [`Error::Shape`] for places of other widths or another number of images.
    pub fn maps(
        &self,
        judged: &[Judgement],
        places: Option<&PatchTokens>,
    ) -> Result<Vec<Option<Vec<f32>>>, Error> {
        if let Some(places) = places
            && places.len() != judged.len()
        {
            return Err(Error::Shape {
                what: "places".into(),
                found: vec![places.len(), places.patches()],
                expected: vec![judged.len(), places.patches()],
            });
        }
        let objects = match places {
            Some(places) => self.object_values(places, None)?,
            None => Vec::new(),
        };
        let judged = judged.iter().enumerate();
        Ok(judged
            .map(|(i, judgement)| self.map_of(objects.get(i), judgement.map.as_ref()))
            .collect())
    }

    /// One map from the values of its places, in standard deviations, and from its patch distances.
    pub fn map_of(
        &self,
        objects: Option<&Vec<f32>>,
        distances: Option<&Vec<f32>>,
    ) -> Option<Vec<f32>> {
        let share = self.patch_share();
        let broken = || {
            let as_it_is = Standard::from_values(&[]);
            let scale = self.patches.as_ref()?.map_scale.unwrap_or(as_it_is);
            let distances = distances?.iter();
            Some(distances.map(move |d| scale.z(f64::from(*d)) as f32))
        };
        if share >= 1.0 {
            return Some(broken()?.collect());
        }
        if share <= 0.0 {
            return objects.cloned();
        }
        let share = share as f32;
        let pairs = objects?.iter().zip(broken()?);
        Some(
            pairs
                .map(|(object, broken)| (1.0 - share) * object + share * broken)
                .collect(),
        )
    }
}

impl PatchMemory {
    /// The scale of distances in maps: of all patches of left-out normal images.
    pub(crate) fn map_scale(distances: &[crate::PatchDistances]) -> Standard {
        let values: Vec<f64> = distances
            .iter()
            .flat_map(|of_image| of_image.map.iter().copied())
            .map(f64::from)
            .collect();
        Standard::from_values(&values)
    }
}
