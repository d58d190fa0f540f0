//! Per-region overlap of pixel maps.

use ndarray::ArrayView2;

use crate::{Class, Error};

/// Customary false positive rate up to which PRO is integrated (Bergmann et al., MVTec AD).
pub const PRO_FPR_LIMIT: f64 = 0.3;

/// Area under the per-region-overlap curve up to `fpr_limit`, divided by it; 1 is perfect.
///
/// At each threshold every defect region (8-connected, over all images) counts the share of its
/// pixels that score at least the threshold, and the mean over regions is drawn against the false
/// positive rate over all defect-free pixels, linear between thresholds. Small defects so weigh as
/// much as large ones (Bergmann et al., IJCV 2021).
///
/// `maps`, `masks`: one `[rows, columns]` pair an image; true marks a defect.
/// # Errors
/// [`Error::Length`], [`Error::MapShape`], [`Error::Empty`], [`Error::NotFinite`];
/// [`Error::TooFew`] when the masks hold no defect or nothing else; [`Error::Config`] when
/// `fpr_limit` is not in `0 < fpr_limit <= 1`.
pub fn pro(
    maps: &[ArrayView2<'_, f64>],
    masks: &[ArrayView2<'_, bool>],
    fpr_limit: f64,
) -> Result<f64, Error> {
    if !(fpr_limit > 0.0 && fpr_limit <= 1.0) {
        let expected = "0 < fpr_limit <= 1";
        return Err(Error::Config {
            field: "fpr_limit",
            value: fpr_limit,
            expected,
        });
    }
    let pixels = Pixels::collect(maps, masks)?;

    // Rates right before and after the pixels that share a score.
    let (mut fpr, mut overlap, mut area) = (0.0, 0.0, 0.0);
    for tied in pixels.sorted.chunk_by(|a, b| a.score == b.score) {
        let new_fpr = fpr + tied.iter().filter(|p| p.share == 0.0).count() as f64 / pixels.normal;
        let new_overlap = overlap + tied.iter().map(|p| p.share).sum::<f64>();
        if new_fpr >= fpr_limit {
            let slope = (new_overlap - overlap) / (new_fpr - fpr);
            let at_limit = overlap + slope * (fpr_limit - fpr);
            area += (fpr_limit - fpr) * f64::midpoint(overlap, at_limit);
            break;
        }
        area += (new_fpr - fpr) * f64::midpoint(overlap, new_overlap);
        (fpr, overlap) = (new_fpr, new_overlap);
    }
    Ok((area / fpr_limit).clamp(0.0, 1.0))
}

/// A pixel's score and what it adds to the mean overlap: 0 for a defect-free pixel, else one over
/// (pixels of its region times regions).
struct Pixel {
    score: f64,
    share: f64,
}

struct Pixels {
    sorted: Vec<Pixel>,
    normal: f64,
}

impl Pixels {
    fn collect(
        maps: &[ArrayView2<'_, f64>],
        masks: &[ArrayView2<'_, bool>],
    ) -> Result<Self, Error> {
        if maps.len() != masks.len() {
            return Err(Error::Length {
                left_name: "score maps",
                left: maps.len(),
                right_name: "masks",
                right: masks.len(),
            });
        }
        let mut sorted = Vec::new();
        let mut regions = 0_usize;
        for (image, (map, mask)) in maps.iter().zip(masks).enumerate() {
            if map.dim() != mask.dim() {
                let shape = |(rows, columns): (usize, usize)| [rows, columns];
                return Err(Error::MapShape {
                    image,
                    map: shape(map.dim()),
                    mask: shape(mask.dim()),
                });
            }
            let start = sorted.len();
            for &score in map {
                if !score.is_finite() {
                    return Err(Error::NotFinite {
                        index: sorted.len(),
                        value: score,
                    });
                }
                sorted.push(Pixel { score, share: 0.0 });
            }
            for region in regions_of(mask) {
                regions += 1;
                for &pixel in &region {
                    sorted[start + pixel].share = 1.0 / region.len() as f64;
                }
            }
        }
        if sorted.is_empty() {
            return Err(Error::Empty { what: "pixels" });
        }
        let normal = sorted.iter().filter(|p| p.share == 0.0).count();
        for (class, found) in [
            (Class::Normal, normal),
            (Class::Abnormal, sorted.len() - normal),
        ] {
            if found == 0 {
                return Err(Error::TooFew {
                    class,
                    found,
                    needed: 1,
                });
            }
        }
        for pixel in &mut sorted {
            pixel.share /= regions as f64;
        }
        sorted.sort_unstable_by(|a, b| b.score.total_cmp(&a.score));
        Ok(Self {
            sorted,
            normal: normal as f64,
        })
    }
}

/// Pixels (row-major) of each 8-connected region of `mask`.
fn regions_of(mask: &ArrayView2<'_, bool>) -> Vec<Vec<usize>> {
    let (rows, columns) = mask.dim();
    let mut open: Vec<bool> = mask.iter().copied().collect();
    let mut regions = Vec::new();
    for seed in 0..open.len() {
        if !std::mem::take(&mut open[seed]) {
            continue;
        }
        // The region is its own queue: pixels behind `next` have had their neighbours taken.
        let mut region = vec![seed];
        let mut next = 0;
        while let Some(&pixel) = region.get(next) {
            next += 1;
            let (y, x) = (pixel / columns, pixel % columns);
            for v in y.saturating_sub(1)..(y + 2).min(rows) {
                for u in x.saturating_sub(1)..(x + 2).min(columns) {
                    if std::mem::take(&mut open[v * columns + u]) {
                        region.push(v * columns + u);
                    }
                }
            }
        }
        regions.push(region);
    }
    regions
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, array};

    use super::*;

    #[test]
    fn diagonal_neighbours_are_one_region() {
        let mask = array![
            [true, false, true],
            [false, true, false],
            [false, false, false]
        ];
        assert_eq!(regions_of(&mask.view()).len(), 1);
        let mask = array![[true, false, true], [true, false, true]];
        assert_eq!(regions_of(&mask.view()), [vec![0, 3], vec![2, 5]]);
    }

    #[test]
    fn hand_computed() {
        // Two regions: one pixel scored first, four pixels never found before all else.
        let map = array![
            [9.0, 5.0, 0.0, 0.0],
            [5.0, 5.0, 0.0, 0.0],
            [5.0, 5.0, 5.0, 5.0]
        ];
        let mask = array![
            [true, false, true, true],
            [false, false, true, true],
            [false, false, false, false]
        ];
        // Overlap is 0.5 at FPR 0 and stays there until FPR 1.
        let found = pro(&[map.view()], &[mask.view()], 0.3).unwrap();
        assert!((found - 0.5).abs() < 1e-12);
    }

    #[test]
    fn a_constant_map_follows_the_diagonal() {
        let map = Array2::zeros((4, 4));
        let mut mask = Array2::from_elem((4, 4), false);
        mask[[0, 0]] = true;
        let found = pro(&[map.view()], &[mask.view()], PRO_FPR_LIMIT).unwrap();
        assert!((found - 0.15).abs() < 1e-12);
    }

    #[test]
    fn a_perfect_map_has_one() {
        let mask = array![[true, false], [false, false]];
        let map = mask.mapv(f64::from);
        let found = pro(&[map.view(), map.view()], &[mask.view(), mask.view()], 0.3).unwrap();
        assert!((found - 1.0).abs() < 1e-12);
    }

    #[test]
    fn refuses_what_has_no_answer() {
        let (map, empty) = (Array2::zeros((2, 2)), Array2::from_elem((2, 2), false));
        let full = Array2::from_elem((2, 2), true);
        let wide = Array2::from_elem((2, 3), true);
        let fails = |mask: &Array2<bool>| pro(&[map.view()], &[mask.view()], 0.3).unwrap_err();
        assert!(matches!(
            fails(&empty),
            Error::TooFew {
                class: Class::Abnormal,
                ..
            }
        ));
        assert!(matches!(
            fails(&full),
            Error::TooFew {
                class: Class::Normal,
                ..
            }
        ));
        assert!(matches!(
            fails(&wide),
            Error::MapShape {
                image: 0,
                map: [2, 2],
                mask: [2, 3]
            }
        ));
        assert!(matches!(pro(&[], &[], 0.3), Err(Error::Empty { .. })));
        assert!(matches!(
            pro(&[map.view()], &[], 0.3),
            Err(Error::Length { .. })
        ));
        assert!(matches!(pro(&[], &[], 0.0), Err(Error::Config { .. })));
    }
}
