//! The parts of an image that are novel, as boxes.

use defend_vit::Grid;
use serde::Serialize;

use crate::{MapScale, PatchMap};

/// A part of an image whose patches are novel, in shares of the width and height of what the detector looks at.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct NovelRegion {
    /// Its left side, `0..=1`.
    pub left: f32,
    /// Its upper side.
    pub top: f32,
    /// Its right side.
    pub right: f32,
    /// Its lower side.
    pub bottom: f32,
    /// Its most novel patch, above what is usual there: 1 where an overlay has its full colour.
    pub strength: f32,
}

/// Of an overlay's full colour: what 99 % of the patches of normal images stay below.
const LEAST_STRENGTH: f32 = 0.5;

impl MapScale {
    /// The novel parts of a map, strongest first: patches that lie farther above what is usual at their place than 99 % of the patches
    /// of normal images do, joined where they share a side or a corner. None for a map of another grid.
    pub fn regions(&self, map: &PatchMap) -> Vec<NovelRegion> {
        let Grid { rows, columns } = map.grid;
        if map.values.len() != self.usual.len() || map.values.len() != rows * columns {
            return Vec::new();
        }
        let span = self.span.max(f32::EPSILON);
        let strengths: Vec<f32> = self.above(map).iter().map(|above| above / span).collect();
        let mut open: Vec<bool> = strengths.iter().map(|s| *s > LEAST_STRENGTH).collect();
        let mut regions = Vec::new();
        for first in 0..open.len() {
            if !std::mem::take(&mut open[first]) {
                continue;
            }
            let (mut left, mut right) = (columns, 0);
            let (mut top, mut bottom) = (rows, 0);
            let (mut strength, mut reached) = (0f32, vec![first]);
            while let Some(patch) = reached.pop() {
                let (row, column) = (patch / columns, patch % columns);
                (left, right) = (left.min(column), right.max(column + 1));
                (top, bottom) = (top.min(row), bottom.max(row + 1));
                strength = strength.max(strengths[patch]);
                for y in row.saturating_sub(1)..(row + 2).min(rows) {
                    for x in column.saturating_sub(1)..(column + 2).min(columns) {
                        if std::mem::take(&mut open[y * columns + x]) {
                            reached.push(y * columns + x);
                        }
                    }
                }
            }
            let share = |at: usize, of: usize| at as f32 / of as f32;
            regions.push(NovelRegion {
                left: share(left, columns),
                top: share(top, rows),
                right: share(right, columns),
                bottom: share(bottom, rows),
                strength,
            });
        }
        regions.sort_by(|a, b| b.strength.total_cmp(&a.strength));
        regions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_that_touch_are_one_region() {
        let grid = Grid {
            rows: 4,
            columns: 5,
        };
        let scale = MapScale {
            usual: [vec![0.0; 19], vec![9.0]].concat(),
            span: 2.0,
        };
        #[rustfmt::skip]
        let values = vec![
            1.1, 0.0, 0.0, 0.0, 3.0,
            0.0, 1.2, 0.0, 0.0, 0.0,
            0.0, 0.0, 0.0, 0.0, 0.9,
            0.0, 0.0, f32::NAN, 0.0, 9.9,
        ];
        let map = PatchMap { grid, values };
        let region = |left, top, right, bottom, strength| NovelRegion {
            left,
            top,
            right,
            bottom,
            strength,
        };
        assert_eq!(
            scale.regions(&map),
            [
                region(0.8, 0.0, 1.0, 0.25, 1.5),
                region(0.0, 0.0, 0.4, 0.5, 0.6)
            ]
        );
        let other = PatchMap {
            values: vec![5.0; 4],
            ..map
        };
        assert!(scale.regions(&other).is_empty());
    }
}
