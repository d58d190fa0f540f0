//! Figures over pixels, for data sets that say where the defects are.

use defend_core::PatchMap;
use defend_core::data::Dataset;
use defend_core::metrics::{PRO_FPR_LIMIT, auroc, pro};
use image::imageops::{FilterType, resize};
use image::{ImageBuffer, Luma};
use ndarray::{Array2, ArrayView1, ArrayView2};

use crate::Error;

/// Side that maps and masks are compared at, pixels.
pub const PIXEL_SIDE: u32 = 224;

#[derive(Debug, Clone, Copy)]
pub(crate) struct PixelFigures {
    pub(crate) auroc: f64,
    pub(crate) pro: f64,
}

/// Over all test images; `None` where the data set has no mask or the system no maps.
pub(crate) fn pixel_figures(
    set: &dyn Dataset,
    indices: &[usize],
    maps: &[Option<&PatchMap>],
) -> Result<Option<PixelFigures>, Error> {
    let Some(maps) = maps.iter().copied().collect::<Option<Vec<_>>>() else {
        return Ok(None);
    };
    let side = PIXEL_SIDE as usize;
    let (mut masks, mut any) = (Vec::with_capacity(indices.len()), false);
    for &index in indices {
        let mask = match set.mask(index)? {
            Some(mask) => {
                any = true;
                let mask = resize(&mask, PIXEL_SIDE, PIXEL_SIDE, FilterType::Nearest);
                mask.into_raw().into_iter().map(|value| value > 0).collect()
            }
            None => vec![false; side * side],
        };
        masks.push(mask);
    }
    if !any {
        return Ok(None);
    }
    let scores: Vec<Vec<f64>> = maps.into_iter().map(enlarge).collect();
    let (all_scores, all_masks) = (scores.concat(), masks.concat());
    let area = auroc(ArrayView1::from(&all_scores), ArrayView1::from(&all_masks))?;
    drop((all_scores, all_masks));
    let square = |values: Vec<f64>| Array2::from_shape_vec((side, side), values).ok();
    let scores: Vec<Array2<f64>> = scores.into_iter().filter_map(square).collect();
    let square = |values: Vec<bool>| Array2::from_shape_vec((side, side), values).ok();
    let masks: Vec<Array2<bool>> = masks.into_iter().filter_map(square).collect();
    let scores: Vec<ArrayView2<'_, f64>> = scores.iter().map(|a| a.view()).collect();
    let masks: Vec<ArrayView2<'_, bool>> = masks.iter().map(|a| a.view()).collect();
    Ok(Some(PixelFigures {
        auroc: area,
        pro: pro(&scores, &masks, PRO_FPR_LIMIT)?,
    }))
}

/// A map at [`PIXEL_SIDE`], bilinear.
fn enlarge(map: &PatchMap) -> Vec<f64> {
    let (columns, rows) = (map.grid.columns as u32, map.grid.rows as u32);
    let small = ImageBuffer::<Luma<f32>, _>::from_raw(columns, rows, map.values.clone());
    let large = small.map(|small| resize(&small, PIXEL_SIDE, PIXEL_SIDE, FilterType::Triangle));
    let values = large.map(ImageBuffer::into_raw).unwrap_or_default();
    values.into_iter().map(f64::from).collect()
}
