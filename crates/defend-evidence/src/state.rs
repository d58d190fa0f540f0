//! A closed form as plain arrays, for any file format.

use std::collections::BTreeMap;

use ndarray::{Array1, Array2};
use serde::{Deserialize, Serialize};

use crate::closed_form::{WeighedContrast, WeighedPatches};
use crate::contrast::Contrast;
use crate::known::Known;
use crate::objects::ScaledObjects;
use crate::patches::CoreSet;
use crate::{
    ClosedForm, Embeddings, Error, EvidenceConfig, FaultDirection, Groups, ObjectMemory,
    PatchMemory, Standard, Summary,
};

/// Everything about a [`ClosedForm`] but its arrays; saved as JSON or the like.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateHeader {
    /// Of the posterior; forms that were saved before there was such a weight had 1.
    #[serde(default = "equal_weight")]
    first_part: f64,
    config: EvidenceConfig,
    summary: Summary,
    scale: Standard,
    contrast: Option<PieceHeader>,
    patch_weight: f64,
    patches: Option<Standard>,
    /// Of the distances in maps; forms that were saved before there was such a scale show them as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    patch_maps: Option<Standard>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    objects: Option<Standard>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    known: Option<Standard>,
}

fn equal_weight() -> f64 {
    1.0
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PieceHeader {
    scale: Standard,
    weight: f64,
}

/// One array of a saved form, row-major.
#[derive(Debug, Clone, PartialEq)]
pub enum StateArray {
    /// A matrix.
    Matrix(Array2<f32>),
    /// Numbers of double precision.
    Numbers(Vec<f64>),
    /// Numbers of rows or groups.
    Indices(Vec<u32>),
}

/// A [`ClosedForm`] as a header and named arrays.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// Scalars and settings.
    pub header: StateHeader,
    /// Arrays by name.
    pub arrays: BTreeMap<String, StateArray>,
}

fn indices(values: &[usize]) -> StateArray {
    StateArray::Indices(values.iter().map(|&i| i as u32).collect())
}

impl ClosedForm {
    /// What has to be saved. A restored form gives the same scores, on the same machine to the last bit.
    pub fn state(&self) -> State {
        let mut arrays = BTreeMap::new();
        let parts = |name: &str, embeddings: &Embeddings| -> Vec<(String, StateArray)> {
            let parts = embeddings.parts().iter().enumerate();
            parts
                .map(|(i, part)| (format!("{name}.{i}"), StateArray::Matrix(part.clone())))
                .collect()
        };
        arrays.extend(parts("normal", &self.normal));
        if let Some(known) = &self.known {
            arrays.extend(parts("abnormal", &known.abnormal));
        }
        if let Some(background) = &self.background {
            arrays.extend(parts("background", background));
        } else if let Some(weighed) = &self.contrast {
            arrays.extend(parts("ordinary", &weighed.ordinary));
        }
        let mut add = |name: String, array| {
            arrays.insert(name, array);
        };
        add("groups".into(), indices(&self.groups.of));
        add("leaders".into(), indices(&self.groups.leaders));
        add("left_out".into(), StateArray::Numbers(self.unaided.clone()));
        if let Some(known) = &self.known {
            add("known.rows".into(), indices(&known.normal_rows));
            add(
                "known".into(),
                StateArray::Numbers(known.contrast.coefficients().to_vec()),
            );
            add(
                "known.left_out".into(),
                StateArray::Numbers(known.left_out.clone()),
            );
        }
        if let Some(weighed) = &self.contrast {
            if self.background.is_some() {
                add("ordinary.rows".into(), indices(&weighed.ordinary_rows));
            }
            add("contrast.rows".into(), indices(&weighed.normal_rows));
            add(
                "contrast".into(),
                StateArray::Numbers(weighed.contrast.coefficients().to_vec()),
            );
        }
        for (i, core) in self
            .memory()
            .map(PatchMemory::blocks)
            .into_iter()
            .flatten()
            .enumerate()
        {
            add(
                format!("patches.{i}"),
                StateArray::Matrix(core.patches.clone()),
            );
            add(format!("patches.{i}.groups"), indices(&core.groups));
        }
        let faults = self.memory().map(PatchMemory::faults).into_iter().flatten();
        for (i, fault) in faults.enumerate() {
            let numbers = StateArray::Numbers(fault.numbers());
            add(format!("patches.{i}.fault"), numbers);
        }
        if let Some(memory) = self.objects() {
            let normal = memory.normal();
            add("objects".into(), StateArray::Matrix(normal.patches.clone()));
            add("objects.groups".into(), indices(&normal.groups));
            if let Some(ordinary) = memory.ordinary() {
                add(
                    "objects.ordinary".into(),
                    StateArray::Matrix(ordinary.clone()),
                );
            }
        }
        State {
            header: StateHeader {
                first_part: self.config.posterior.first_part,
                config: self.config.clone(),
                summary: self.summary,
                scale: self.scale,
                contrast: self.contrast.as_ref().map(|c| PieceHeader {
                    scale: c.scale,
                    weight: c.weight,
                }),
                patch_weight: self.patch_weight,
                patches: self.patches.as_ref().map(|p| p.scale),
                patch_maps: self.patches.as_ref().and_then(|p| p.map_scale),
                objects: self.objects.as_ref().map(|o| o.scale),
                known: self.known.as_ref().map(|k| k.scale),
            },
            arrays,
        }
    }

    /// The form that a state was made of.
    ///
    /// # Errors
    /// [`Error::State`] when an array is missing or does not fit the others, and those of [`Embeddings::new`].
    pub fn from_state(state: State) -> Result<Self, Error> {
        let State { mut header, arrays } = state;
        header.config.posterior.first_part = header.first_part;
        let mut arrays = Arrays(arrays);
        header.config.validate()?;
        let normal = arrays.embeddings("normal")?;
        let groups = Groups {
            of: arrays.indices("groups", normal.len())?,
            leaders: arrays.indices("leaders", usize::MAX)?,
        };
        let whole = !normal.is_empty()
            && groups.of.iter().all(|g| *g < groups.leaders.len())
            && groups.leaders.iter().all(|row| *row < normal.len());
        if !whole {
            return Err(fault("groups do not fit the images".into()));
        }
        let finite =
            |s: Standard| s.mean.is_finite() && s.deviation.is_finite() && s.deviation > 0.0;
        let scales = [
            Some(header.scale),
            header.contrast.map(|c| c.scale),
            header.patches,
            header.patch_maps,
            header.objects,
            header.known,
        ];
        let numbers = [header.summary.width, header.patch_weight];
        if !(scales.into_iter().flatten().all(finite) && numbers.iter().all(|n| n.is_finite())) {
            return Err(fault("a scale or width is not finite".into()));
        }
        let left_out = arrays.numbers("left_out", usize::MAX)?;
        let mut form = Self::restore(
            header.config,
            header.summary,
            (normal, groups),
            header.scale,
            header.patch_weight,
            left_out,
        )?;
        if arrays.0.contains_key("background.0") {
            let background = arrays.embeddings("background")?;
            form.normal.check_widths(&background, "the background")?;
            form.background = Some(background);
        }
        if let Some(piece) = header.contrast {
            form.contrast = Some(contrast(&form, piece, &mut arrays)?);
        }
        if let Some(scale) = header.patches {
            let mut blocks = Vec::new();
            while let Some(patches) = arrays.matrix(&format!("patches.{}", blocks.len()))? {
                let groups =
                    arrays.indices(&format!("patches.{}.groups", blocks.len()), patches.nrows())?;
                blocks.push(CoreSet { patches, groups });
            }
            if blocks.is_empty() {
                return Err(fault("patches.0 is missing".into()));
            }
            let faults = faults(&blocks, &mut arrays)?;
            let memory = PatchMemory::new(blocks, form.config.patches.worst).with_faults(faults);
            form.patches = Some(WeighedPatches {
                memory,
                scale,
                map_scale: header.patch_maps,
            });
        }
        if let Some(scale) = header.objects {
            form.objects = Some(objects(&form, scale, &mut arrays)?);
        }
        if let Some(scale) = header.known {
            form.known = Some(known(&form, scale, &mut arrays)?);
        }
        if form.left_out_images().len() != form.unaided.len() {
            return Err(fault("left-out values do not fit the groups".into()));
        }
        form.settle();
        match arrays.0.into_keys().next() {
            Some(name) => Err(fault(format!("\"{name}\" belongs to no part of it"))),
            None => Ok(form),
        }
    }
}

/// The saved contrast with ordinary images.
fn contrast(
    form: &ClosedForm,
    PieceHeader { scale, weight }: PieceHeader,
    arrays: &mut Arrays,
) -> Result<WeighedContrast, Error> {
    let config = form.config.contrast;
    let (ordinary, ordinary_rows) = match &form.background {
        Some(background) => {
            let rows = arrays.indices("ordinary.rows", usize::MAX)?;
            if rows.iter().any(|row| *row >= background.len()) {
                return Err(fault("ordinary.rows do not fit the background".into()));
            }
            (background.select(&rows), rows)
        }
        // As earlier versions saved it.
        None => (arrays.embeddings("ordinary")?, Vec::new()),
    };
    let rows = arrays.indices("contrast.rows", usize::MAX)?;
    if rows.iter().any(|row| *row >= form.normal.len()) {
        return Err(fault("contrast.rows do not fit the images".into()));
    }
    let contrasted = [&form.normal.select(&rows), &ordinary];
    Ok(WeighedContrast {
        contrast: regression(
            ["contrast", "ordinary"],
            contrasted,
            config.parts,
            config.width,
            arrays,
        )?,
        normal_rows: rows,
        ordinary,
        ordinary_rows,
        scale,
        weight,
    })
}

/// The saved contrast with known abnormal images.
fn known(form: &ClosedForm, scale: Standard, arrays: &mut Arrays) -> Result<Known, Error> {
    let config = form.config.known;
    let abnormal = arrays.embeddings("abnormal")?;
    let normal_rows = arrays.indices("known.rows", usize::MAX)?;
    let known_rows = normal_rows.iter().all(|row| *row < form.normal.len());
    if !(known_rows && normal_rows.is_sorted()) {
        return Err(fault("known.rows do not fit the images".into()));
    }
    let contrasted = [&form.normal.select(&normal_rows), &abnormal];
    Ok(Known {
        contrast: regression(
            ["known", "abnormal"],
            contrasted,
            usize::MAX,
            config.width,
            arrays,
        )?,
        abnormal,
        scale,
        left_out: arrays.numbers("known.left_out", normal_rows.len())?,
        normal_rows,
    })
}

/// What known faults look like in each of the blocks, or nothing.
fn faults(blocks: &[CoreSet], arrays: &mut Arrays) -> Result<Vec<FaultDirection>, Error> {
    let name = |block: usize| format!("patches.{block}.fault");
    if !arrays.has(&name(0)) {
        return Ok(Vec::new());
    }
    let of_block = |(block, core): (usize, &CoreSet)| {
        // A direction, an offset and a step.
        let numbers = arrays.numbers(&name(block), core.patches.ncols() + 2)?;
        FaultDirection::of_numbers(&numbers).ok_or_else(|| fault(name(block)))
    };
    blocks.iter().enumerate().map(of_block).collect()
}

/// The saved memory for maps of objects.
fn objects(
    form: &ClosedForm,
    scale: Standard,
    arrays: &mut Arrays,
) -> Result<ScaledObjects, Error> {
    let patches = arrays
        .matrix("objects")?
        .ok_or_else(|| fault("objects is missing".into()))?;
    let groups = arrays.indices("objects.groups", patches.nrows())?;
    let ordinary = arrays.matrix("objects.ordinary")?;
    if ordinary
        .as_ref()
        .is_some_and(|rows| rows.ncols() != patches.ncols())
    {
        return Err(fault("objects.ordinary has another width".into()));
    }
    let width = form.config.objects.width;
    let memory = ObjectMemory::new(CoreSet { patches, groups }, ordinary, width);
    Ok(ScaledObjects { memory, scale })
}

/// The saved regression `name` of normal images against those that are called `others`, on their first `parts` parts.
fn regression(
    [name, others]: [&str; 2],
    contrasted: [&Embeddings; 2],
    parts: usize,
    width: f64,
    arrays: &mut Arrays,
) -> Result<Contrast, Error> {
    let [normal, other] = contrasted.map(|images| images.features(parts));
    let points = ndarray::concatenate(ndarray::Axis(0), &[normal.view(), other.view()])
        .map_err(|_| fault(format!("{others} images have another width")))?;
    let coefficients = Array1::from(arrays.numbers(name, points.nrows())?);
    Ok(Contrast::from_parts(points, coefficients, width))
}

fn fault(reason: String) -> Error {
    Error::State { reason }
}

/// Arrays that are taken out by name.
struct Arrays(BTreeMap<String, StateArray>);

impl Arrays {
    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    fn matrix(&mut self, name: &str) -> Result<Option<Array2<f32>>, Error> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(StateArray::Matrix(matrix)) if matrix.iter().all(|v| v.is_finite()) => {
                Ok(Some(matrix))
            }
            Some(_) => Err(fault(format!("\"{name}\" is no matrix of finite numbers"))),
        }
    }

    fn embeddings(&mut self, name: &str) -> Result<Embeddings, Error> {
        let mut parts = Vec::new();
        while let Some(part) = self.matrix(&format!("{name}.{}", parts.len()))? {
            parts.push(part);
        }
        if parts.is_empty() {
            return Err(fault(format!("{name}.0 is missing")));
        }
        Embeddings::new(parts)
    }

    /// `count`: how many are expected, `usize::MAX` for any number.
    fn indices(&mut self, name: &str, count: usize) -> Result<Vec<usize>, Error> {
        match self.0.remove(name) {
            Some(StateArray::Indices(values)) if count == usize::MAX || values.len() == count => {
                Ok(values.into_iter().map(|i| i as usize).collect())
            }
            _ => Err(fault(format!(
                "\"{name}\" is missing or has another length"
            ))),
        }
    }

    fn numbers(&mut self, name: &str, count: usize) -> Result<Vec<f64>, Error> {
        match self.0.remove(name) {
            Some(StateArray::Numbers(values))
                if (count == usize::MAX || values.len() == count)
                    && values.iter().all(|v| v.is_finite()) =>
            {
                Ok(values)
            }
            _ => Err(fault(format!(
                "\"{name}\" is missing, has another length or values that are not finite"
            ))),
        }
    }
}
