//! Where the novelty of an image is.

use defend_vit::Grid;
use serde::{Deserialize, Serialize};

/// A novelty value for each patch.
#[derive(Debug, Clone, PartialEq)]
pub struct PatchMap {
    /// Patches of the view.
    pub grid: Grid,
    /// Values, row-major over the grid.
    pub values: Vec<f32>,
}

/// The two neighbours of a target position and the share of the second.
fn neighbours(target: usize, from: usize, to: usize) -> (usize, usize, f32) {
    let at = (target as f32 + 0.5) * from as f32 / to as f32 - 0.5;
    let at = at.clamp(0.0, (from - 1) as f32);
    let first = at as usize;
    (first, (first + 1).min(from - 1), at - first as f32)
}

impl PatchMap {
    /// The values at another size, row-major, bilinear as PyTorch's `interpolate(align_corners=False)`, of any magnitude;
    /// `None` when their number does not fit the grid.
    pub fn resized(&self, width: usize, height: usize) -> Option<Vec<f32>> {
        let Grid { rows, columns } = self.grid;
        if rows == 0 || columns == 0 || self.values.len() != rows * columns {
            return None;
        }
        let across: Vec<_> = (0..width).map(|x| neighbours(x, columns, width)).collect();
        let mut values = Vec::with_capacity(width * height);
        for y in 0..height {
            let (top, bottom, down) = neighbours(y, rows, height);
            let (top, bottom) = (top * columns, bottom * columns);
            let between = |a: f32, b: f32, share: f32| a + (b - a) * share;
            values.extend(across.iter().map(|&(left, right, share)| {
                let upper = between(self.values[top + left], self.values[top + right], share);
                let lower = between(
                    self.values[bottom + left],
                    self.values[bottom + right],
                    share,
                );
                between(upper, lower, down)
            }));
        }
        Some(values)
    }
}

/// How patch values become colours, from the training images.
///
/// Some patches are always hard to predict, such as a Vision Transformer's corners: what counts is how far a
/// value lies above what is usual at its position.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MapScale {
    /// Median value of each patch over training images, row-major: no colour up to it.
    pub usual: Vec<f32>,
    /// Distance above it that gets the full colour: twice the 99th percentile of the training images.
    pub span: f32,
}

impl MapScale {
    /// What each patch of a map has above what is usual there, row-major; of a map of another grid as many values as both have.
    pub fn above(&self, map: &PatchMap) -> Vec<f32> {
        let pairs = map.values.iter().zip(&self.usual);
        pairs.map(|(value, usual)| value - usual).collect()
    }

    /// Centre of the patch that lies farthest above what is usual there, in shares of the image's width and height; the first of
    /// equals. `None` for a map of another grid and one without numbers.
    pub fn peak(&self, map: &PatchMap) -> Option<[f32; 2]> {
        let Grid { rows, columns } = map.grid;
        if map.values.len() != self.usual.len() || map.values.len() != rows * columns {
            return None;
        }
        let numbers = self
            .above(map)
            .into_iter()
            .enumerate()
            .filter(|(_, value)| !value.is_nan());
        let (patch, _) = numbers.reduce(|best, next| if next.1 > best.1 { next } else { best })?;
        let centre = |at: usize, of: usize| (at as f32 + 0.5) / of as f32;
        Some([
            centre(patch % columns, columns),
            centre(patch / columns, rows),
        ])
    }

    /// The median of each patch over `maps` of one grid, and `headroom` times the 99th percentile of what lies above it.
    pub fn from_maps(maps: &[&PatchMap], headroom: f32) -> Self {
        let patches = maps.first().map_or(0, |map| map.values.len());
        let usual: Vec<f32> = (0..patches)
            .map(|i| {
                let values = maps.iter().filter_map(|map| map.values.get(i).copied());
                quantile(values.collect(), 0.5)
            })
            .collect();
        let above = maps.iter().flat_map(|map| {
            let pairs = map.values.iter().zip(&usual);
            pairs.map(|(value, usual)| value - usual)
        });
        let span = headroom * quantile(above.collect(), 0.99);
        Self { usual, span }
    }
}

/// The value at a share of the order, 0 without any.
fn quantile(mut values: Vec<f32>, share: f64) -> f32 {
    values.sort_by(f32::total_cmp);
    let at = (share * values.len().saturating_sub(1) as f64).round() as usize;
    values.get(at).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_what_lies_farthest_above_the_usual() {
        let grid = Grid {
            rows: 2,
            columns: 4,
        };
        let scale = MapScale {
            usual: vec![9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0],
            span: 1.0,
        };
        let values = vec![9.5, 1.0, 0.0, 0.0, f32::NAN, 0.0, 3.0, 2.0];
        let map = PatchMap { grid, values };
        assert_eq!(scale.peak(&map), Some([0.625, 0.75]));
        let other = PatchMap {
            values: vec![0.0; 4],
            ..map
        };
        assert_eq!(scale.peak(&other), None);
    }
}
