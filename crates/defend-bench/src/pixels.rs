//! Figures over pixels, for data sets that say where the defects are.

use defend_core::PatchMap;
use defend_core::data::Dataset;
use defend_core::metrics::{PRO_FPR_LIMIT, auroc, pro};
use image::imageops::{FilterType, resize};
use ndarray::Array1;

use crate::Error;

/// Side that maps and masks are compared at, pixels.
pub const PIXEL_SIDE: u32 = 224;

#[derive(Debug, Clone, Copy)]
pub(crate) struct PixelFigures {
    pub(crate) auroc: f64,
    pub(crate) pro: f64,
}

/// The masks of test images at [`PIXEL_SIDE`], `None` for images without one; `None` for data sets without any.
pub(crate) fn masks(
    set: &dyn Dataset,
    indices: &[usize],
) -> Result<Option<Vec<Option<Vec<bool>>>>, Error> {
    let small = |index: &usize| -> Result<Option<Vec<bool>>, Error> {
        let mask = set.mask(*index)?;
        Ok(mask.map(|mask| {
            let mask = resize(&mask, PIXEL_SIDE, PIXEL_SIDE, FilterType::Nearest);
            mask.into_raw().into_iter().map(|value| value > 0).collect()
        }))
    };
    let masks = indices.iter().map(small).collect::<Result<Vec<_>, _>>()?;
    Ok(masks.iter().any(Option::is_some).then_some(masks))
}

/// Over all test images; `None` where the data set has no mask with anything in it or the method no maps.
pub(crate) fn pixel_figures(
    masks: Option<&[Option<Vec<bool>>]>,
    maps: &[Option<&PatchMap>],
) -> Result<Option<PixelFigures>, Error> {
    let maps: Option<Vec<&PatchMap>> = maps.iter().copied().collect();
    let (Some(masks), Some(maps)) = (masks, maps) else {
        return Ok(None);
    };
    let side = PIXEL_SIDE as usize;
    let enlarged: Option<Vec<Vec<f32>>> = maps.iter().map(|map| map.resized(side, side)).collect();
    let Some(enlarged) = enlarged else {
        return Ok(None);
    };
    let scores: Vec<f64> = enlarged.concat().into_iter().map(f64::from).collect();
    let truth: Vec<bool> = masks
        .iter()
        .flat_map(|mask| mask.clone().unwrap_or_else(|| vec![false; side * side]))
        .collect();
    if !truth.contains(&true) {
        // All masks are black: there is nothing to find.
        return Ok(None);
    }
    let (scores, truth) = (Array1::from(scores), Array1::from(truth));
    let area = auroc(scores.view(), truth.view())?;
    let shape = (maps.len(), side, side);
    let scores = scores.into_shape_with_order(shape).ok();
    let truth = truth.into_shape_with_order(shape).ok();
    let (Some(scores), Some(truth)) = (scores, truth) else {
        return Ok(None);
    };
    let scores: Vec<_> = scores.outer_iter().collect();
    let truth: Vec<_> = truth.outer_iter().collect();
    Ok(Some(PixelFigures {
        auroc: area,
        pro: pro(&scores, &truth, PRO_FPR_LIMIT)?,
    }))
}
