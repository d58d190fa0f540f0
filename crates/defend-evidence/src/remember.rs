//! The patch memory of a fit.

use defend_random::Rng;

use crate::closed_form::{WeighedPatches, spread};
use crate::{ClosedForm, Error, PatchMemory, PatchTokens, Standard};

impl ClosedForm {
    /// Kept images whose patches [`ClosedForm::remember`] wants, leaders of groups before others; none where patches do not count.
    pub fn patch_images(&self) -> Vec<usize> {
        if self.patch_weight <= 0.0 {
            return Vec::new();
        }
        let limit = self.config.patches.images;
        let (mut leading, mut others) = (Vec::new(), Vec::new());
        let mut leads = vec![false; self.normal.len()];
        for &leader in &self.groups.leaders {
            if let Some(leads) = leads.get_mut(leader) {
                *leads = true;
            }
        }
        for row in self.judged() {
            if leads.get(row).copied().unwrap_or(false) {
                &mut leading
            } else {
                &mut others
            }
            .push(row);
        }
        let mut wanted = spread(&leading, limit);
        wanted.extend(spread(&others, limit - wanted.len()));
        wanted.sort_unstable();
        wanted
    }

    /// Chooses the patch memory from the patches of [`ClosedForm::patch_images`], in that order; returns the distances of each of
    /// these images' patches when its group is left out.
    ///
    /// # Errors
    /// [`Error::Shape`] for patches of another number of images.
    pub fn remember(
        &mut self,
        tokens: &PatchTokens,
        rng: &mut Rng,
    ) -> Result<Vec<Vec<f32>>, Error> {
        let groups = self.patch_groups(tokens)?;
        let memory = PatchMemory::choose(tokens, &groups, &self.config.patches, rng);
        self.remember_these(tokens, memory)
    }

    /// As [`ClosedForm::remember`], with core sets that were chosen already.
    ///
    /// # Errors
    /// As [`ClosedForm::remember`].
    pub fn remember_these(
        &mut self,
        tokens: &PatchTokens,
        memory: PatchMemory,
    ) -> Result<Vec<Vec<f32>>, Error> {
        let groups = self.patch_groups(tokens)?;
        let distances = memory.distances(tokens, Some(&groups))?;
        let values: Vec<f64> = distances.iter().map(|d| d.log_worst).collect();
        // A single group has nothing left out: its patches were compared with none.
        let scale = if self.groups.len() < 2 {
            Standard::from_values(&[])
        } else {
            Standard::from_values(&values)
        };
        if self.patch_weight > 0.0 {
            let images = self.patch_images();
            let sum_of = |image: &usize| {
                self.judged
                    .binary_search(image)
                    .ok()
                    .and_then(|i| self.sums.get(i))
            };
            let sums: Vec<f64> = images
                .iter()
                .zip(&values)
                .filter_map(|(image, value)| {
                    Some(sum_of(image)? + self.patch_weight * scale.z(*value))
                })
                .collect();
            self.unaided = self.one_a_group(&sums, &images);
        }
        self.patches = Some(WeighedPatches {
            memory,
            scale,
            map_scale: Some(PatchMemory::map_scale(&distances)),
        });
        self.settle();
        Ok(distances.into_iter().map(|d| d.map).collect())
    }

    pub(crate) fn patch_groups(&self, tokens: &PatchTokens) -> Result<Vec<usize>, Error> {
        let images = self.patch_images();
        if tokens.len() != images.len() {
            return Err(Error::Shape {
                what: "patch tokens".into(),
                found: vec![tokens.len(), tokens.patches()],
                expected: vec![images.len(), tokens.patches()],
            });
        }
        Ok(images
            .iter()
            .filter_map(|&image| self.groups.of.get(image).copied())
            .collect())
    }

    /// A value of each group.
    pub(crate) fn one_a_group<T: Copy>(&self, values: &[T], images: &[usize]) -> Vec<T> {
        let places = self.places_of_groups(images);
        places
            .iter()
            .filter_map(|&i| values.get(i))
            .copied()
            .collect()
    }

    /// The places of one image of each group: of its leader where it is there, else of another.
    fn places_of_groups(&self, images: &[usize]) -> Vec<usize> {
        let mut seen = vec![false; self.groups.len()];
        let mut places = Vec::new();
        let leads = |image: usize| {
            self.groups
                .of
                .get(image)
                .is_some_and(|&g| self.groups.leaders.get(g) == Some(&image))
        };
        for first in [true, false] {
            for (place, &image) in images.iter().enumerate() {
                let Some(group) = self.groups.of.get(image) else {
                    continue;
                };
                let Some(seen) = seen.get_mut(*group) else {
                    continue;
                };
                if !*seen && (leads(image) || !first) {
                    *seen = true;
                    places.push(place);
                }
            }
        }
        places
    }
}
