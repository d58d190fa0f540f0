//! The distance between teacher and student features (eqs. 3 and 4).

use candle_core::{D, DType, Tensor};
use defend_nn::ops;
use serde::{Deserialize, Serialize};

use crate::Error;

/// Role: how far a student's features are from the teacher's.
///
/// ```
/// use candle_core::{D, Device, Tensor};
/// use defend_distill::{DistillObjective, Error};
///
/// /// Largest difference of a channel.
/// struct Largest;
///
/// impl DistillObjective for Largest {
///     fn distances(&self, teacher: &Tensor, student: &Tensor) -> Result<Tensor, Error> {
///         Ok((teacher - student)?.abs()?.max(D::Minus1)?)
///     }
/// }
///
/// let teacher = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu)?;
/// let student = Tensor::new(&[[1f32, 5.0], [2.0, 4.0]], &Device::Cpu)?;
/// assert_eq!(Largest.distances(&teacher, &student)?.to_vec1::<f32>()?, [3.0, 1.0]);
/// # Ok::<(), Error>(())
/// ```
pub trait DistillObjective: Send + Sync {
    /// One distance a vector, differentiable with respect to the student.
    ///
    /// `teacher`, `student`: `[..., D]`; returns `[...]`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the shapes differ.
    fn distances(&self, teacher: &Tensor, student: &Tensor) -> Result<Tensor, Error>;
}

/// How features are normalised before they are compared (Table 1b).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FeatureNorm {
    /// As they are.
    None,
    /// LayerNorm over the channels, without scale and shift.
    Layer,
    /// To unit length (eq. 3).
    L2,
}

/// Which side is normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NormalizedSide {
    /// Teacher and student (eq. 3).
    Both,
    /// The teacher only (paper, section 4.6: best for pixel-level tasks, with smooth L1).
    Teacher,
}

/// How a difference of channels is penalised; summed over the channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Penalty {
    /// Its square (eq. 4).
    Squared,
    /// Half its square below one, its magnitude less a half above (Huber, beta 1).
    SmoothL1,
}

/// The paper's distance and its ablations; the default is eqs. 3 and 4: the squared distance of unit
/// vectors, `0..=4`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FeatureDistance {
    /// Normalisation of the features.
    pub norm: FeatureNorm,
    /// Which side is normalised.
    pub side: NormalizedSide,
    /// Penalty of a channel's difference.
    pub penalty: Penalty,
}

impl Default for FeatureDistance {
    fn default() -> Self {
        Self {
            norm: FeatureNorm::L2,
            side: NormalizedSide::Both,
            penalty: Penalty::Squared,
        }
    }
}

impl FeatureDistance {
    /// Refuses combinations without a meaning of their own.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn validate(self) -> Result<(), Error> {
        if self.norm == FeatureNorm::None && self.side == NormalizedSide::Teacher {
            return Err(Error::Config {
                field: "distance.side",
                value: "teacher".into(),
                expected: "both where distance.norm is none: there is nothing to normalise on one side",
            });
        }
        Ok(())
    }

    fn normalize(self, x: &Tensor) -> Result<Tensor, Error> {
        Ok(match self.norm {
            FeatureNorm::None => x.clone(),
            FeatureNorm::L2 => ops::l2_normalize(x)?,
            FeatureNorm::Layer => {
                let d = x.dim(D::Minus1)?;
                let ones = Tensor::ones(d, x.dtype(), x.device())?;
                ops::layer_norm(x, &ones, &ones.zeros_like()?, 1e-6)?
            }
        })
    }
}

impl DistillObjective for FeatureDistance {
    fn distances(&self, teacher: &Tensor, student: &Tensor) -> Result<Tensor, Error> {
        if teacher.dims() != student.dims() {
            return Err(Error::Shape {
                what: "student features",
                found: student.dims().to_vec(),
                expected: teacher.dims().to_vec(),
            });
        }
        // Losses accumulate in f32 whatever the backbones compute in.
        let wide = |t: &Tensor| match t.dtype() {
            DType::F64 => Ok(t.clone()),
            _ => t.to_dtype(DType::F32),
        };
        let teacher = self.normalize(&wide(&teacher.detach())?)?;
        let student = match self.side {
            NormalizedSide::Both => self.normalize(&wide(student)?)?,
            NormalizedSide::Teacher => wide(student)?,
        };
        let difference = (student - teacher)?;
        let penalty = match self.penalty {
            Penalty::Squared => difference.sqr()?,
            Penalty::SmoothL1 => {
                // With c = min(|d|, 1): c |d| - c^2 / 2 is both branches at once.
                let magnitude = difference.abs()?;
                let inner = magnitude.minimum(&magnitude.ones_like()?)?.detach();
                ((&inner * &magnitude)? - (inner.sqr()? * 0.5)?)?
            }
        };
        Ok(penalty.sum(D::Minus1)?)
    }
}
