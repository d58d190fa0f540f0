//! Heat maps over images.

use defend_data::RgbImage;
use image::{ImageBuffer, Rgb};

use crate::{MapScale, PatchMap};

/// Largest share of the colour in the image.
const OPACITY: f32 = 0.65;

/// Lays a patch map over an image: transparent where a value is usual, full colour at `scale.span` above.
///
/// The map is interpolated bilinearly to the image's size. A map whose number of values does not
/// fit its grid or the scale leaves the image as it is.
pub fn overlay(image: &RgbImage, map: &PatchMap, scale: &MapScale) -> RgbImage {
    let (width, height) = image.dimensions();
    if map.values.len() != scale.usual.len() {
        return image.clone();
    }
    let pairs = map.values.iter().zip(&scale.usual);
    let above = PatchMap {
        grid: map.grid,
        values: pairs.map(|(value, usual)| value - usual).collect(),
    };
    let Some(heat) = above.resized(width as usize, height as usize) else {
        return image.clone();
    };
    let span = scale.span.max(f32::EPSILON);
    ImageBuffer::from_fn(width, height, |x, y| {
        let value = heat.get(y as usize * width as usize + x as usize);
        let level = (value.copied().unwrap_or(0.0) / span).clamp(0.0, 1.0);
        let colour = colorous::INFERNO.eval_continuous(f64::from(0.25 + 0.75 * level));
        let Rgb(pixel) = *image.get_pixel(x, y);
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
    fn values_of_any_magnitude_are_interpolated() {
        let grid = Grid {
            rows: 1,
            columns: 2,
        };
        let map = PatchMap {
            grid,
            values: vec![-20.0, 60.0],
        };
        // Centres of four targets lie at -0.25, 0.25, 0.75 and 1.25 of the two sources.
        assert_eq!(map.resized(4, 1).unwrap(), [-20.0, 0.0, 40.0, 60.0]);
        assert_eq!(map.resized(2, 2).unwrap(), [-20.0, 60.0, -20.0, 60.0]);
        let values = vec![0.0; 3];
        assert!(PatchMap { grid, values }.resized(4, 1).is_none());
    }

    #[test]
    fn large_values_get_the_colour_of_their_place_in_the_scale() {
        let image = RgbImage::from_pixel(2, 1, Rgb([0; 3]));
        let grid = Grid {
            rows: 1,
            columns: 2,
        };
        let shown = |values: Vec<f32>| {
            let scale = MapScale {
                usual: vec![100.0; 2],
                span: 80.0,
            };
            overlay(&image, &PatchMap { grid, values }, &scale)
        };
        let (half, full) = (shown(vec![140.0, 100.0]), shown(vec![180.0, 100.0]));
        assert!(full.get_pixel(0, 0)[0] > half.get_pixel(0, 0)[0] + 40);
        assert_eq!(full.get_pixel(1, 0), &Rgb([0; 3]));
    }

    #[test]
    fn colour_appears_where_the_map_is_high() {
        let image = RgbImage::from_pixel(32, 32, Rgb([10, 20, 30]));
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
        let out = overlay(&image, &map, &scale);
        assert_eq!(out.get_pixel(2, 2), &Rgb([10, 20, 30]));
        assert!(out.get_pixel(30, 30)[0] > 100);
        for values in [vec![0.0], vec![0.0; 5]] {
            let grid = map.grid;
            assert_eq!(overlay(&image, &PatchMap { grid, values }, &scale), image);
        }
    }
}
