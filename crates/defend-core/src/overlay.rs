//! Heat maps over pictures.

use defend_data::RgbImage;
use image::imageops::FilterType;
use image::{ImageBuffer, Luma, Rgb};

use crate::{MapScale, PatchMap};

/// Largest share of the colour in the picture.
const OPACITY: f32 = 0.65;

/// Lays a patch map over a picture: transparent where a value is usual, full colour at `scale.span` above.
///
/// The map is interpolated bilinearly to the picture's size. A map whose number of values does not
/// fit its grid or the scale leaves the picture as it is.
pub fn overlay(picture: &RgbImage, map: &PatchMap, scale: &MapScale) -> RgbImage {
    let (width, height) = picture.dimensions();
    let (columns, rows) = (map.grid.columns as u32, map.grid.rows as u32);
    if map.values.len() != scale.usual.len() {
        return picture.clone();
    }
    let pairs = map.values.iter().zip(&scale.usual);
    let above = pairs.map(|(value, usual)| value - usual).collect();
    let Some(heat) = ImageBuffer::<Luma<f32>, Vec<f32>>::from_raw(columns, rows, above) else {
        return picture.clone();
    };
    let span = scale.span.max(f32::EPSILON);
    let heat = image::imageops::resize(&heat, width, height, FilterType::Triangle);
    ImageBuffer::from_fn(width, height, |x, y| {
        let level = (heat.get_pixel(x, y).0[0] / span).clamp(0.0, 1.0);
        let colour = colorous::INFERNO.eval_continuous(f64::from(0.25 + 0.75 * level));
        let Rgb(pixel) = *picture.get_pixel(x, y);
        let alpha = OPACITY * level;
        let blend = |under: u8, over: u8| {
            (f32::from(under) * (1.0 - alpha) + f32::from(over) * alpha).round() as u8
        };
        Rgb([
            blend(pixel[0], colour.r),
            blend(pixel[1], colour.g),
            blend(pixel[2], colour.b),
        ])
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use defend_vit::Grid;

    #[test]
    fn colour_appears_where_the_map_is_high() {
        let picture = RgbImage::from_pixel(32, 32, Rgb([10, 20, 30]));
        let map = PatchMap {
            grid: Grid {
                rows: 2,
                columns: 2,
            },
            values: vec![0.3, 0.0, 0.0, 1.0],
        };
        // The first patch is always as high as here.
        let scale = MapScale {
            usual: vec![0.3, 0.1, 0.1, 0.1],
            span: 0.8,
        };
        let out = overlay(&picture, &map, &scale);
        assert_eq!(out.get_pixel(2, 2), &Rgb([10, 20, 30]));
        assert!(out.get_pixel(30, 30)[0] > 100);
        for values in [vec![0.0], vec![0.0; 5]] {
            let grid = map.grid;
            assert_eq!(
                overlay(&picture, &PatchMap { grid, values }, &scale),
                picture
            );
        }
    }
}
