//! Which patches the student sees (eq. 2).

use candle_core::{DType, Tensor};
use defend_nn::Rng;
use defend_vit::{Grid, TokenSet};
use rand::RngExt;
use serde::{Deserialize, Serialize};

use crate::Error;

/// Role: chooses the kept patches of each image from the teacher's CLS attention.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use defend_distill::{Error, MaskPolicy};
/// use defend_nn::Rng;
/// use defend_vit::{Grid, TokenSet};
///
/// /// The student sees the upper half.
/// struct UpperHalf;
///
/// impl MaskPolicy for UpperHalf {
///     fn keep(&self, attention: &Tensor, grid: Grid, _: &mut Rng) -> Result<Option<TokenSet>, Error> {
///         let kept: Vec<u32> = (0..grid.patches() as u32 / 2).collect();
///         let rows = vec![kept; attention.dim(0)?];
///         Ok(Some(TokenSet::from_rows(&rows, grid, attention.device())?))
///     }
/// }
///
/// let grid = Grid { rows: 2, columns: 3 };
/// let attention = Tensor::ones((4, 6), DType::F32, &Device::Cpu)?;
/// let kept = UpperHalf.keep(&attention, grid, &mut Rng::seed(0))?;
/// assert_eq!(kept.map(|set| set.indices().dims().to_vec()), Some(vec![4, 3]));
/// # Ok::<(), Error>(())
/// ```
pub trait MaskPolicy: Send + Sync {
    /// `attention`: mean over heads, `[B, N]`, on `grid`; `None` keeps every patch.
    ///
    /// # Errors
    /// [`Error::Shape`] when the attention does not cover the grid.
    fn keep(
        &self,
        attention: &Tensor,
        grid: Grid,
        rng: &mut Rng,
    ) -> Result<Option<TokenSet>, Error>;
}

/// How a guided mask turns attention into a choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Selection {
    /// The patches with the largest attention.
    TopK,
    /// Drawn without replacement with probability proportional to the attention (authors' code).
    Sampled,
}

/// The masks of the paper's Table 1d; `ratio` is the share of hidden patches, `0..=0.9`.
///
/// The paper leaves open which side the guide hides: the caption of Fig. 2 says that the student's input
/// "is masked over the most informative regions", the authors' code keeps them. Both are here.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Mask {
    /// The student sees everything.
    None,
    /// Hidden patches are drawn uniformly.
    Random {
        /// Share of hidden patches.
        ratio: f64,
    },
    /// Informative patches are kept (authors' code).
    KeepSalient {
        /// Share of hidden patches.
        ratio: f64,
        /// How the kept patches are chosen.
        selection: Selection,
    },
    /// Informative patches are hidden (Fig. 2).
    HideSalient {
        /// Share of hidden patches.
        ratio: f64,
        /// How the hidden patches are chosen.
        selection: Selection,
    },
}

impl Mask {
    /// Share of hidden patches.
    pub fn ratio(&self) -> f64 {
        match *self {
            Self::None => 0.0,
            Self::Random { ratio }
            | Self::KeepSalient { ratio, .. }
            | Self::HideSalient { ratio, .. } => ratio,
        }
    }

    /// Checks the ratio.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn validate(&self) -> Result<(), Error> {
        if (0.0..=0.9).contains(&self.ratio()) {
            return Ok(());
        }
        Err(Error::Config {
            field: "mask.ratio",
            value: self.ratio().to_string(),
            expected: "a share of hidden patches in 0..=0.9",
        })
    }

    /// The kept patches of one image, in the order of the grid.
    fn keep_row(&self, attention: &[f32], rng: &mut Rng) -> Vec<u32> {
        let n = attention.len();
        let hidden = ((self.ratio() * n as f64).round() as usize).min(n.saturating_sub(1));
        // An exponential clock with rate w rings first with probability proportional to w: the order
        // of the rings is sampling without replacement (Efraimidis and Spirakis, 2006).
        let mut clock = |w: f64| -(1.0 - rng.random::<f64>()).ln() / w.max(1e-12);
        let keys: Vec<f64> = match self {
            Self::None => vec![0.0; n],
            Self::Random { .. } => (0..n).map(|_| clock(1.0)).collect(),
            Self::KeepSalient { selection, .. } | Self::HideSalient { selection, .. } => attention
                .iter()
                .map(|&a| match selection {
                    Selection::TopK => -f64::from(a),
                    Selection::Sampled => clock(f64::from(a)),
                })
                .collect(),
        };
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| keys[a].total_cmp(&keys[b]).then(a.cmp(&b)));
        let chosen = match self {
            Self::HideSalient { .. } => &order[hidden..],
            _ => &order[..n - hidden],
        };
        let mut kept: Vec<u32> = chosen.iter().map(|&i| i as u32).collect();
        kept.sort_unstable();
        kept
    }
}

impl MaskPolicy for Mask {
    fn keep(
        &self,
        attention: &Tensor,
        grid: Grid,
        rng: &mut Rng,
    ) -> Result<Option<TokenSet>, Error> {
        self.validate()?;
        if self.ratio() == 0.0 {
            return Ok(None);
        }
        if attention.rank() != 2 || attention.dims().last() != Some(&grid.patches()) {
            return Err(Error::Shape {
                what: "CLS attention",
                found: attention.dims().to_vec(),
                expected: vec![
                    attention.dims().first().copied().unwrap_or(0),
                    grid.patches(),
                ],
            });
        }
        let rows = attention.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let kept: Vec<Vec<u32>> = rows.iter().map(|row| self.keep_row(row, rng)).collect();
        Ok(Some(TokenSet::from_rows(&kept, grid, attention.device())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    const GRID: Grid = Grid {
        rows: 2,
        columns: 4,
    };

    fn kept(mask: Mask, seed: u64) -> Vec<u32> {
        let attention = [0.02f32, 0.3, 0.01, 0.2, 0.03, 0.1, 0.15, 0.04];
        let attention = Tensor::new(&[attention], &Device::Cpu).unwrap();
        let set = mask
            .keep(&attention, GRID, &mut Rng::seed(seed))
            .unwrap()
            .unwrap();
        set.indices().get(0).unwrap().to_vec1().unwrap()
    }

    #[test]
    fn top_k_masks_are_exact_and_complementary() {
        let (ratio, selection) = (0.5, Selection::TopK);
        assert_eq!(
            kept(Mask::KeepSalient { ratio, selection }, 0),
            [1, 3, 5, 6]
        );
        assert_eq!(
            kept(Mask::HideSalient { ratio, selection }, 0),
            [0, 2, 4, 7]
        );
    }

    #[test]
    fn sampled_masks_follow_the_attention() {
        let (ratio, selection) = (0.75, Selection::Sampled);
        let count = |mask: Mask, patch: u32| {
            (0..2000)
                .filter(|&seed| kept(mask, seed).contains(&patch))
                .count()
        };
        let keep = Mask::KeepSalient { ratio, selection };
        let hide = Mask::HideSalient { ratio, selection };
        let random = Mask::Random { ratio };
        assert!(
            count(keep, 1) > 3 * count(keep, 7),
            "salient patches are kept more often"
        );
        assert!(
            count(hide, 7) > 3 * count(hide, 1),
            "salient patches are hidden more often"
        );
        let uniform = count(random, 1);
        assert!(
            (400..600).contains(&uniform),
            "{uniform} of 2000, expected a quarter"
        );
    }

    #[test]
    fn the_ratio_is_met_and_checked() -> Result<(), Error> {
        for (ratio, expected) in [(0.25, 6), (0.5, 4), (0.9, 1)] {
            assert_eq!(kept(Mask::Random { ratio }, 1).len(), expected);
        }
        assert!(Mask::Random { ratio: 0.95 }.validate().is_err());
        let attention = Tensor::zeros((1, 8), DType::F32, &Device::Cpu)?;
        assert!(
            Mask::None
                .keep(&attention, GRID, &mut Rng::seed(0))?
                .is_none()
        );
        let wrong = Grid {
            rows: 3,
            columns: 3,
        };
        let result = Mask::Random { ratio: 0.5 }.keep(&attention, wrong, &mut Rng::seed(0));
        assert!(matches!(result, Err(Error::Shape { .. })));
        Ok(())
    }
}
