//! Methods of one step on the teacher's untouched features.

use std::sync::Arc;

use candle_core::Tensor;
use defend_core::data::Dataset;
use defend_core::nn::ops::l2_normalize;
use defend_core::vit::Features;
use defend_core::{Error, Novelty, NoveltyDetector, Observer};
use serde::{Deserialize, Serialize};

use crate::components::gaussian::Gaussian;
use crate::components::neighbours::{Bank, Distance};
use crate::components::scored::{Density, Pool, Scored, mapped, unmapped};
use crate::method::{cls_of, each_batch};
use crate::{Method, Teacher};

/// Mean cosine distance of a token to its nearest neighbours among the normal images (DN2: Bergman, Cohen and Hoshen,
/// 2020; PANDA without its adaptation).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NearestNeighbours {
    /// Neighbours that are averaged. DN2: 2.
    pub neighbours: usize,
    /// What stands for an image.
    pub token: Token,
}

/// What stands for an image in [`NearestNeighbours`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Token {
    /// The CLS token.
    Cls,
    /// The mean of the patch tokens.
    MeanPatch,
}

impl Token {
    /// `[B, D]`.
    fn of(self, features: &Features) -> Result<Tensor, Error> {
        Ok(match self {
            Self::Cls => features.cls.clone(),
            Self::MeanPatch => features.patches.mean(1)?,
        })
    }
}

impl Default for NearestNeighbours {
    fn default() -> Self {
        Self {
            neighbours: 5,
            token: Token::Cls,
        }
    }
}

/// Mean distance of a token to the nearest of a bank.
pub(crate) struct Nearest {
    bank: Bank,
    neighbours: usize,
    token: Token,
}

impl Nearest {
    pub(crate) fn new(bank: Bank, neighbours: usize, token: Token) -> Self {
        Self {
            bank,
            neighbours,
            token,
        }
    }
}

impl Density for Nearest {
    fn novelties(&self, features: &Features) -> Result<Vec<Novelty>, Error> {
        let queries = self.token.of(features)?;
        Ok(unmapped(self.bank.nearest(&queries, self.neighbours)?))
    }
}

impl Method for NearestNeighbours {
    fn fit(
        &self,
        teacher: &Teacher,
        normal: Arc<dyn Dataset>,
        _seed: u64,
        observer: &mut dyn Observer,
    ) -> Result<Box<dyn NoveltyDetector>, Error> {
        let backbone = teacher.backbone(1)?;
        let images = teacher.read(normal, observer)?;
        let mut tokens = Vec::new();
        each_batch(&*backbone, &images, |features| {
            tokens.push(self.token.of(&features)?);
            Ok(())
        })?;
        let bank = Bank::new(&Tensor::cat(&tokens, 0)?, Distance::Cosine)?;
        let density = Nearest::new(bank, self.neighbours, self.token);
        Ok(Scored::boxed(teacher, backbone, density))
    }

    fn name(&self) -> String {
        let token = match self.token {
            Token::Cls => "CLS",
            Token::MeanPatch => "mean patch",
        };
        format!("{}-NN {token}", self.neighbours)
    }

    fn deviations(&self) -> &'static str {
        "tokens of a ViT and cosine distance in place of a ResNet's pooled features and Euclidean distance"
    }
}

/// Cosine distance of the CLS token to the mean of the normal images' unit CLS tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MeanCls {}

impl Method for MeanCls {
    fn fit(
        &self,
        teacher: &Teacher,
        normal: Arc<dyn Dataset>,
        _seed: u64,
        observer: &mut dyn Observer,
    ) -> Result<Box<dyn NoveltyDetector>, Error> {
        let backbone = teacher.backbone(1)?;
        let cls = cls_of(&*backbone, &teacher.read(normal, observer)?)?;
        let mean = l2_normalize(&cls)?.mean_keepdim(0)?;
        let density = Nearest::new(Bank::new(&mean, Distance::Cosine)?, 1, Token::Cls);
        Ok(Scored::boxed(teacher, backbone, density))
    }

    fn name(&self) -> String {
        "cosine to mean CLS".into()
    }

    fn deviations(&self) -> &'static str {
        ""
    }
}

/// Mahalanobis distance of the CLS token, with Ledoit and Wolf's covariance (Lee et al., 2018; Rippel et al., 2021).
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mahalanobis {}

struct GaussianCls(Gaussian);

impl Density for GaussianCls {
    fn novelties(&self, features: &Features) -> Result<Vec<Novelty>, Error> {
        let rows = features.cls.to_vec2::<f32>()?;
        Ok(unmapped(
            rows.iter().map(|row| self.0.distance(row)).collect(),
        ))
    }
}

impl Method for Mahalanobis {
    fn fit(
        &self,
        teacher: &Teacher,
        normal: Arc<dyn Dataset>,
        _seed: u64,
        observer: &mut dyn Observer,
    ) -> Result<Box<dyn NoveltyDetector>, Error> {
        let backbone = teacher.backbone(1)?;
        let rows = cls_of(&*backbone, &teacher.read(normal, observer)?)?.to_vec2()?;
        let density = GaussianCls(Gaussian::fit(&rows)?);
        Ok(Scored::boxed(teacher, backbone, density))
    }

    fn name(&self) -> String {
        "Mahalanobis CLS".into()
    }

    fn deviations(&self) -> &'static str {
        "one normal distribution over the last CLS token, in place of one for each block of an EfficientNet"
    }
}

/// The student that always predicts the mean: squared distance of each unit patch token to the mean of the normal
/// images' unit tokens at its position. A distilled student that is no better has learnt nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConstantStudent {}

struct PositionMeans(Tensor);

impl Density for PositionMeans {
    fn novelties(&self, features: &Features) -> Result<Vec<Novelty>, Error> {
        let difference = l2_normalize(&features.patches)?.broadcast_sub(&self.0)?;
        let distances = difference.sqr()?.sum(candle_core::D::Minus1)?;
        mapped(&distances, features.grid, Pool::Mean)
    }
}

impl Method for ConstantStudent {
    fn fit(
        &self,
        teacher: &Teacher,
        normal: Arc<dyn Dataset>,
        _seed: u64,
        observer: &mut dyn Observer,
    ) -> Result<Box<dyn NoveltyDetector>, Error> {
        let backbone = teacher.backbone(1)?;
        let images = teacher.read(normal, observer)?;
        let mut sums = Vec::new();
        let mut count = 0;
        each_batch(&*backbone, &images, |features| {
            count += features.batch_size()?;
            sums.push(l2_normalize(&features.patches)?.sum(0)?);
            Ok(())
        })?;
        let means = (Tensor::stack(&sums, 0)?.sum(0)? / f64::from(count as u32))?;
        Ok(Scored::boxed(teacher, backbone, PositionMeans(means)))
    }

    fn name(&self) -> String {
        "constant student".into()
    }

    fn deviations(&self) -> &'static str {
        ""
    }
}
