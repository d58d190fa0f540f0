//! KDAD (Salehi et al., 2021, "Multiresolution Knowledge Distillation") on the blocks of a ViT.

use std::sync::Arc;

use candle_core::{D, Tensor};
use defend_core::data::Dataset;
use defend_core::distill::{Aggregation, DistillConfig, DistillObjective, Mask};
use defend_core::nn::ops::l2_normalize;
use defend_core::{
    Defend, DefendConfig, Error, MaskedConfig, NoveltyDetector, Observer, Student, distill,
};
use serde::{Deserialize, Serialize};

use crate::{Method, Teacher};

/// A student that sees whole images learns values and directions of the teacher's last blocks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Kdad {
    /// Blocks that are compared, counted from the last. Paper: four pooling layers of a VGG.
    pub layers: usize,
    /// Weight of the directions beside the mean squared difference of the values (that paper's lambda); ours.
    pub direction_weight: f64,
    /// Passes over the images.
    pub epochs: usize,
    /// Images a step.
    #[serde(alias = "batch")]
    pub batch_size: usize,
    /// Peak learning rate. Authors' code: 1e-3.
    pub learning_rate: f64,
}

impl Default for Kdad {
    fn default() -> Self {
        Self {
            layers: 4,
            direction_weight: 0.5,
            epochs: 10,
            batch_size: 32,
            learning_rate: 1e-3,
        }
    }
}

/// Mean squared difference of the channels, plus the weighted cosine distance.
struct ValuesAndDirections {
    direction_weight: f64,
}

impl DistillObjective for ValuesAndDirections {
    fn distances(&self, teacher: &Tensor, student: &Tensor) -> Result<Tensor, distill::Error> {
        if teacher.dims() != student.dims() {
            return Err(distill::Error::Shape {
                what: "student features",
                found: student.dims().to_vec(),
                expected: teacher.dims().to_vec(),
            });
        }
        let teacher = teacher.detach();
        let values = (student - &teacher)?.sqr()?.mean(D::Minus1)?;
        let cosine = (l2_normalize(student)? * l2_normalize(&teacher)?)?.sum(D::Minus1)?;
        Ok((values + ((1.0 - cosine)? * self.direction_weight)?)?)
    }
}

impl Method for Kdad {
    fn fit(
        &self,
        teacher: &Teacher,
        normal: Arc<dyn Dataset>,
        seed: u64,
        observer: &mut dyn Observer,
    ) -> Result<Box<dyn NoveltyDetector>, Error> {
        let settings = DefendConfig {
            seed,
            resize_mode: teacher.preprocess().resize_mode,
            student: Student::Masked(MaskedConfig {
                aggregation: Aggregation::Mean,
                distill: DistillConfig {
                    epochs: self.epochs,
                    batch_size: self.batch_size,
                    mask: Mask::None,
                    layers: self.layers,
                    cls_weight: 0.0,
                    learning_rate: self.learning_rate,
                    ..DistillConfig::default()
                },
            }),
            ..DefendConfig::default()
        };
        let fitted = Defend::builder()
            .device(teacher.device().clone())
            .strict(true)
            .teacher(teacher.backbone(self.layers)?)
            .objective(Arc::new(ValuesAndDirections {
                direction_weight: self.direction_weight,
            }))
            .config(settings)
            .fit(normal, observer)?;
        Ok(Box::new(fitted.detector))
    }

    fn layers(&self, _depth: usize) -> usize {
        self.layers
    }

    fn name(&self) -> String {
        "KDAD".into()
    }

    fn deviations(&self) -> &'static str {
        "patch tokens of a ViT's last blocks, each after the final norm, in place of a VGG's pooling layers; directions of \
         each patch, not of the whole map; the student has the teacher's size; AdamW with a cosine schedule; the map is the distance itself, not its input gradient"
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may panic")]

    use candle_core::{DType, Device, Var};

    use super::*;

    #[test]
    fn distance_and_gradient_by_hand() {
        let objective = ValuesAndDirections {
            direction_weight: 0.5,
        };
        let device = Device::Cpu;
        let teacher = Tensor::new(&[[3f64, 4.0]], &device).unwrap();
        let student = Var::from_tensor(&Tensor::new(&[[0f64, 2.0]], &device).unwrap()).unwrap();
        let distance = objective.distances(&teacher, student.as_tensor()).unwrap();
        // ((3 - 0)^2 + (4 - 2)^2) / 2 = 6.5, cosine 0.8.
        let found = distance.to_vec1::<f64>().unwrap()[0];
        assert!((found - (6.5 + 0.5 * 0.2)).abs() < 1e-6, "{found}");

        let grads = distance.sum_all().unwrap().backward().unwrap();
        let grad = grads.get(&student).unwrap().to_vec2::<f64>().unwrap()[0].clone();
        for (i, analytic) in grad.into_iter().enumerate() {
            let at = |step: f64| {
                let mut values = vec![0.0, 2.0];
                values[i] += step;
                let moved = Tensor::from_vec(values, (1, 2), &device).unwrap();
                let moved = objective.distances(&teacher, &moved).unwrap();
                moved
                    .to_dtype(DType::F64)
                    .unwrap()
                    .to_vec1::<f64>()
                    .unwrap()[0]
            };
            let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
            assert!((analytic - numeric).abs() < 1e-5, "{analytic} {numeric}");
        }
    }
}
