//! Known faults: what the patches of known faulty images look like.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayView3, Axis, concatenate};

use crate::linear::solve;
use crate::patches::{CoreSet, worst_places};
use crate::{ClosedForm, Error, PatchTokens};

/// Where known faulty patches of a block lie, seen from the normal ones: a patch that lies there is farther from normal than its
/// nearest normal patch says.
#[derive(Debug, Clone, PartialEq)]
pub struct FaultDirection {
    /// `[channels]`: with `offset`, deviations of a unit token beyond the margin.
    direction: Array1<f32>,
    offset: f32,
    /// What such a deviation adds to the distance.
    step: f32,
}

/// What a direction is fitted with.
pub(crate) struct FaultFit {
    /// Of the regression, for unit tokens.
    pub(crate) ridge: f64,
    /// Deviations of normal patches from which a patch is like a fault.
    pub(crate) margin: f64,
    /// What one more of them adds to the distance.
    pub(crate) step: f64,
}

impl FaultDirection {
    /// Linear ridge regression of core patches (-1) and faulty patches (+1), both weighed to the same total, then standardised over
    /// `normal`, all patches of the normal images `[images, patches, channels]`. Rows have unit length.
    ///
    /// # Errors
    /// [`Error::Factorisation`].
    pub(crate) fn fit(
        core: ArrayView2<'_, f32>,
        faulty: ArrayView2<'_, f32>,
        normal: ArrayView3<'_, f32>,
        fit: &FaultFit,
    ) -> Result<Self, Error> {
        let channels = core.ncols();
        let sides = [(core, -1.0), (faulty, 1.0)];
        let mut mean = Array1::<f64>::zeros(channels);
        for (rows, _) in sides {
            let weight = 0.5 / rows.nrows().max(1) as f64;
            for row in rows.rows() {
                mean.zip_mut_with(&row, |m, v| *m += weight * f64::from(*v));
            }
        }
        let mut gram = Array2::<f64>::zeros((channels, channels));
        let mut target = Array1::<f64>::zeros(channels);
        for (rows, label) in sides {
            let weight = 0.5 / rows.nrows().max(1) as f64;
            let mut centred = rows.mapv(f64::from);
            centred -= &mean;
            target.scaled_add(weight * label, &centred.sum_axis(Axis(0)));
            gram.scaled_add(weight, &centred.t().dot(&centred));
        }
        gram.diag_mut().mapv_inplace(|v| v + fit.ridge);
        let direction = solve(&gram, &target, "the directions of known faults")?;

        let values = of_all(normal, direction.view());
        let count = values.len().max(1) as f64;
        let centre = values.iter().sum::<f64>() / count;
        let spread = values.iter().map(|v| (v - centre).powi(2)).sum::<f64>() / count;
        // Without any spread nothing can be told from anything.
        let scale = if spread > 0.0 {
            1.0 / spread.sqrt()
        } else {
            0.0
        };
        Ok(Self {
            direction: direction.mapv(|v| (v * scale) as f32),
            offset: (-centre * scale - fit.margin) as f32,
            step: fit.step as f32,
        })
    }

    /// What is to be added to the distance of each patch, `[patches, channels]`: never less than nothing.
    pub(crate) fn add_to(&self, patches: ArrayView2<'_, f32>, distances: &mut [f32]) {
        for (patch, distance) in patches.rows().into_iter().zip(distances) {
            *distance += self.step * (patch.dot(&self.direction) + self.offset).max(0.0);
        }
    }

    /// As one row of numbers, for a file.
    pub(crate) fn numbers(&self) -> Vec<f64> {
        let numbers = self.direction.iter().chain([&self.offset, &self.step]);
        numbers.map(|v| f64::from(*v)).collect()
    }

    /// From [`FaultDirection::numbers`].
    pub(crate) fn of_numbers(numbers: &[f64]) -> Option<Self> {
        let [direction @ .., offset, step] = numbers else {
            return None;
        };
        Some(Self {
            direction: direction.iter().map(|v| *v as f32).collect(),
            offset: *offset as f32,
            step: *step as f32,
        })
    }
}

fn of_all(patches: ArrayView3<'_, f32>, direction: ArrayView1<'_, f64>) -> Vec<f64> {
    let direction = direction.mapv(|v| v as f32);
    let images = patches.axis_iter(Axis(0));
    images
        .flat_map(|image| image.dot(&direction).to_vec())
        .map(f64::from)
        .collect()
}

/// Patches of known faulty images.
#[derive(Debug, Clone, Copy)]
pub struct KnownFaults<'a> {
    /// Patches of the images.
    pub tokens: &'a PatchTokens,
    /// Numbers of the faulty patches of each image, where they are known, such as under a mask; an empty list is an image without
    /// any. Of an image for which nothing is known the worst patches are taken, as many as count for a score.
    pub marked: &'a [Option<Vec<usize>>],
}

impl ClosedForm {
    /// Learns what faulty patches look like, where patches count: one that is like them is farther from normal than its
    /// nearest normal patch alone says. `normal`: patches of [`ClosedForm::patch_images`], in that order; returns their distances
    /// with their own group left out. The direction to the faults itself is not left out: it has as many numbers as a token, fitted to
    /// all normal images.
    ///
    /// A failure leaves the form as it was.
    ///
    /// # Errors
    /// [`Error::NeedsImages`] without a patch memory; [`Error::Shape`] for patches of other images, blocks or widths;
    /// [`Error::Empty`] without any faulty patch.
    pub fn learn_faults(
        &mut self,
        normal: &PatchTokens,
        faults: KnownFaults<'_>,
    ) -> Result<Vec<Vec<f32>>, Error> {
        let Some(known) = &self.patches else {
            return Err(Error::NeedsImages {
                reason: "there is no patch memory that faults could be told from",
            });
        };
        let memory = known.memory.without_faults();
        if faults.marked.len() != faults.tokens.len() {
            return Err(Error::Shape {
                what: "marks of the faulty images".into(),
                found: vec![faults.marked.len()],
                expected: vec![faults.tokens.len()],
            });
        }
        let groups = self.patch_groups(normal)?;
        let of_normal = memory.distances_of_blocks(normal, Some(&groups))?;
        let of_faulty = memory.distances_of_blocks(faults.tokens, None)?;
        let images = faults.tokens.len() as f64;
        let hesitation = images / (images + self.config.known.hesitation);
        let mut directions = Vec::new();
        for (block, core) in memory.blocks().iter().enumerate() {
            let rows = faulty_rows(&faults, block, &of_faulty, self.config.patches.worst);
            if rows.is_empty() {
                return Err(Error::Empty {
                    what: "faulty patches",
                });
            }
            let distances = of_normal.iter().filter_map(|image| image.get(block));
            let fit = FaultFit {
                ridge: self.config.patches.fault_ridge,
                margin: self.config.known.margin,
                step: hesitation * deviation(distances.flatten().copied()),
            };
            directions.push(direction(core, &rows, normal, block, &fit)?);
        }
        self.remember_these(normal, memory.with_faults(directions))
    }
}

fn direction(
    core: &CoreSet,
    faulty: &[ArrayView1<'_, f32>],
    normal: &PatchTokens,
    block: usize,
    fit: &FaultFit,
) -> Result<FaultDirection, Error> {
    let rows: Vec<_> = faulty.iter().map(|row| row.insert_axis(Axis(0))).collect();
    let wrong = || Error::Shape {
        what: "channels of the faulty patches".into(),
        found: faulty.first().map_or_else(Vec::new, |row| vec![row.len()]),
        expected: vec![core.patches.ncols()],
    };
    let faulty = concatenate(Axis(0), &rows).map_err(|_| wrong())?;
    let normal = normal.blocks().get(block).ok_or_else(wrong)?;
    FaultDirection::fit(core.patches.view(), faulty.view(), normal.view(), fit)
}

/// Faulty patches of a block.
fn faulty_rows<'a>(
    faults: &KnownFaults<'a>,
    block: usize,
    distances: &[Vec<Vec<f32>>],
    worst: usize,
) -> Vec<ArrayView1<'a, f32>> {
    let Some(tokens) = faults.tokens.blocks().get(block) else {
        return Vec::new();
    };
    let mut rows = Vec::new();
    let images = tokens.axis_iter(Axis(0)).zip(faults.marked).zip(distances);
    for ((image, marked), distances) in images {
        let places = match marked {
            Some(marked) => marked.clone(),
            None => worst_places(distances.get(block).map_or(&[], Vec::as_slice), worst),
        };
        let known = places.into_iter().filter(|place| *place < image.nrows());
        rows.extend(known.map(|place| image.index_axis_move(Axis(0), place)));
    }
    rows
}

fn deviation(values: impl Iterator<Item = f32> + Clone) -> f64 {
    let count = values.clone().count().max(1) as f64;
    let mean = values.clone().map(f64::from).sum::<f64>() / count;
    let squares = values.map(|v| (f64::from(v) - mean).powi(2));
    (squares.sum::<f64>() / count).sqrt()
}
