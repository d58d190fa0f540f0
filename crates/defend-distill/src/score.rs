//! From distances to a novelty score (section 3.3).

use candle_core::{DType, Tensor};
use defend_vit::{Backbone, Grid};
use serde::{Deserialize, Serialize};

use crate::layers::Layers;
use crate::{DistillObjective, Error};

/// What teacher and student disagree on, for a batch of whole images.
#[derive(Debug, Clone)]
pub struct Discrepancy {
    /// Distance of each patch, mean over the compared layers, `[B, N]`, row-major over the grid: the heat map.
    pub patches: Tensor,
    /// Distance of the CLS tokens, mean over the compared layers, `[B]`.
    pub cls: Tensor,
    /// CLS tokens of teacher and student in the last layer, `[B, D]` each.
    pub cls_tokens: [Tensor; 2],
    /// The teacher's CLS attention, mean over heads, `[B, N]`.
    pub attention: Tensor,
    /// Patches of the images.
    pub grid: Grid,
}

/// Runs teacher and student on whole images (no mask) and compares their last `layers` layers.
///
/// # Errors
/// [`Error::Vit`] when the images do not fit, [`Error::Shape`] when the backbones' widths differ,
/// [`Error::Config`] when their features have fewer layers.
pub fn discrepancy(
    teacher: &dyn Backbone,
    student: &dyn Backbone,
    objective: &dyn DistillObjective,
    layers: usize,
    images: &Tensor,
) -> Result<Discrepancy, Error> {
    let features = teacher.features(images)?;
    let t = Layers::from_features(&features, layers)?;
    let predicted = student.features(images)?;
    let s = Layers::from_features(&predicted, layers)?;
    let mean = |distances: Tensor| distances.mean(1).map(|mean| mean.detach());
    Ok(Discrepancy {
        patches: mean(objective.distances(&t.patches, &s.patches)?)?,
        cls: mean(objective.distances(&t.cls, &s.cls)?)?,
        cls_tokens: [features.cls.detach(), predicted.cls.detach()],
        attention: features.cls_attention.mean(1)?,
        grid: features.grid,
    })
}

/// Role: one number for an image, larger for more novel.
///
/// ```
/// use defend_distill::{Discrepancy, Error, Score};
///
/// /// The distance of the CLS token alone.
/// struct Cls;
///
/// impl Score for Cls {
///     fn score(&self, found: &Discrepancy) -> Result<Vec<f32>, Error> {
///         Ok(found.cls.to_vec1()?)
///     }
/// }
/// # let _: &dyn Score = &Cls;
/// ```
pub trait Score: Send + Sync {
    /// One score an image.
    ///
    /// # Errors
    /// [`Error::Candle`] when candle fails.
    fn score(&self, discrepancy: &Discrepancy) -> Result<Vec<f32>, Error>;
}

/// How patch distances become an image's score.
///
/// The paper takes the mean. It asks whether a normal object is present; the mean dilutes a small
/// object, so the other forms look at the patches that matter (METHOD.md, section 3).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Aggregation {
    /// Mean over all patches (paper).
    Mean,
    /// Mean weighted with the teacher's CLS attention.
    AttentionWeighted,
    /// Mean of the patches that the student predicts best: is anything normal here? `share` in `0..=1`.
    BestPatches {
        /// Share of the patches.
        share: f64,
    },
    /// Mean of the patches that it predicts worst: is anything novel here? `share` in `0..=1`.
    WorstPatches {
        /// Share of the patches.
        share: f64,
    },
    /// Distance of the CLS tokens alone; the student must be trained with a CLS weight.
    Cls,
    /// Mean over the patches plus `weight` times the distance of the CLS tokens.
    PatchesAndCls {
        /// Weight of the CLS distance, not negative.
        weight: f64,
    },
}

impl Aggregation {
    /// Checks shares and weights.
    ///
    /// # Errors
    /// [`Error::Config`] that names the field.
    pub fn validate(&self) -> Result<(), Error> {
        let (field, value, ok, expected) = match *self {
            Self::BestPatches { share } | Self::WorstPatches { share } => (
                "aggregation.share",
                share,
                share > 0.0 && share <= 1.0,
                "a share of the patches in 0..=1, above 0",
            ),
            Self::PatchesAndCls { weight } => (
                "aggregation.weight",
                weight,
                weight.is_finite() && weight >= 0.0,
                "zero or a positive number",
            ),
            Self::Mean | Self::AttentionWeighted | Self::Cls => return Ok(()),
        };
        if ok {
            return Ok(());
        }
        Err(Error::Config {
            field,
            value: value.to_string(),
            expected,
        })
    }

    /// Whether the score reads the CLS tokens' distance.
    pub fn uses_cls(&self) -> bool {
        matches!(self, Self::Cls | Self::PatchesAndCls { .. })
    }
}

fn mean(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len().max(1) as f64
}

/// Mean of the `share` smallest values, at least one.
fn mean_of_smallest(mut values: Vec<f32>, share: f64) -> f64 {
    values.sort_by(f32::total_cmp);
    let count = ((share * values.len() as f64).round() as usize).clamp(1, values.len().max(1));
    mean(values.get(..count).unwrap_or(&values))
}

impl Score for Aggregation {
    fn score(&self, discrepancy: &Discrepancy) -> Result<Vec<f32>, Error> {
        self.validate()?;
        let patches = discrepancy.patches.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let attention = discrepancy
            .attention
            .to_dtype(DType::F32)?
            .to_vec2::<f32>()?;
        let cls = discrepancy.cls.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        let images = patches.into_iter().zip(attention).zip(cls);
        let scores = images.map(|((patches, attention), cls)| match *self {
            Self::Mean => mean(&patches),
            Self::AttentionWeighted => {
                let pairs = patches.iter().zip(&attention);
                let weighted: f64 = pairs.map(|(&p, &a)| f64::from(p) * f64::from(a)).sum();
                let total: f64 = attention.iter().map(|&a| f64::from(a)).sum();
                weighted / total.max(1e-12)
            }
            Self::BestPatches { share } => mean_of_smallest(patches, share),
            Self::WorstPatches { share } => {
                let negated = patches.iter().map(|p| -p).collect();
                -mean_of_smallest(negated, share)
            }
            Self::Cls => f64::from(cls),
            Self::PatchesAndCls { weight } => mean(&patches) + weight * f64::from(cls),
        });
        Ok(scores.map(|s| s as f32).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn score(aggregation: Aggregation) -> f32 {
        let tensor = |v: &[f32]| Tensor::new(v, &Device::Cpu).unwrap();
        let discrepancy = Discrepancy {
            patches: tensor(&[0.1, 0.4, 0.2, 0.9]).unsqueeze(0).unwrap(),
            cls: tensor(&[0.5]),
            cls_tokens: [1.0, 0.5].map(|cls| tensor(&[cls]).unsqueeze(0).unwrap()),
            attention: tensor(&[0.5, 0.1, 0.2, 0.1]).unsqueeze(0).unwrap(),
            grid: Grid {
                rows: 2,
                columns: 2,
            },
        };
        aggregation.score(&discrepancy).unwrap()[0]
    }

    #[test]
    fn aggregations_match_hand_computed_values() {
        let cases = [
            (Aggregation::Mean, 0.4),
            (
                Aggregation::AttentionWeighted,
                (0.05 + 0.04 + 0.04 + 0.09) / 0.9,
            ),
            (Aggregation::BestPatches { share: 0.5 }, 0.15),
            (Aggregation::WorstPatches { share: 0.25 }, 0.9),
            (Aggregation::Cls, 0.5),
            (Aggregation::PatchesAndCls { weight: 2.0 }, 1.4),
        ];
        for (aggregation, expected) in cases {
            let found = score(aggregation);
            assert!((found - expected).abs() < 1e-6, "{aggregation:?}: {found}");
        }
        assert!(Aggregation::BestPatches { share: 0.0 }.validate().is_err());
    }
}
