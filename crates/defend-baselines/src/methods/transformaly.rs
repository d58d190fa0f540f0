//! Transformaly (Cohen and Avidan, 2022): the density of pretrained features and of a student's errors, together.

use std::sync::Arc;

use candle_core::{D, Device, Tensor, Var};
use defend_core::data::{Dataset, Preprocess};
use defend_core::nn::Rng;
use defend_core::vit::{Encoder, ImageSource, TrainScope, Trainable, Vit};
use defend_core::{Error, Novelty, NoveltyDetector, Observer};
use serde::{Deserialize, Serialize};

use crate::components::adapted::{Schedule, train_by_loss};
use crate::components::gaussian::Gaussian;
use crate::components::scored::unmapped;
use crate::method::BATCH;
use crate::{Method, Teacher};

/// Each block of a student learns what the teacher's block makes of the same tokens, on whole images; the score is the
/// sum of two squared Mahalanobis distances, of the pretrained CLS token and of the blocks' errors.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Transformaly {
    /// Blocks that are compared, counted from the last, at most those there are. Paper: 10.
    pub layers: usize,
    /// Passes over the images.
    pub epochs: usize,
    /// Images a step.
    #[serde(alias = "batch")]
    pub batch_size: usize,
    /// Learning rate.
    pub learning_rate: f64,
}

impl Default for Transformaly {
    fn default() -> Self {
        Self {
            layers: 10,
            epochs: 10,
            batch_size: 32,
            learning_rate: 1e-3,
        }
    }
}

struct TwoSpaces {
    pair: Pair,
    pretrained: Gaussian,
    errors: Gaussian,
    preprocess: Preprocess,
    device: Device,
}

/// A teacher and a student that takes its blocks' places one at a time.
struct Pair {
    teacher: Arc<Vit>,
    student: Vit,
    /// Blocks that are compared, counted from the last.
    layers: usize,
}

impl Pair {
    /// Mean squared difference of teacher and student after each block, from the teacher's tokens before it: `[B, L]`.
    fn errors(&self, tokens: &[Tensor]) -> Result<Tensor, Error> {
        let first = self.student.spec().architecture.depth - self.layers;
        let pairs = tokens.iter().zip(tokens.iter().skip(1));
        let errors = pairs.enumerate().map(|(i, (before, after))| {
            let guess = self.student.run_block(first + i, before)?;
            Ok((guess - after)?.sqr()?.mean((1, 2))?)
        });
        Ok(Tensor::stack(
            &errors.collect::<Result<Vec<_>, Error>>()?,
            D::Minus1,
        )?)
    }

    fn tokens(&self, images: &Tensor) -> Result<Vec<Tensor>, Error> {
        Ok(self.teacher.block_tokens(images, self.layers)?)
    }

    /// Both spaces, one row an image: the teacher's CLS token, and the errors.
    fn rows(&self, images: &Tensor) -> Result<[Vec<Vec<f32>>; 2], Error> {
        let tokens = self.tokens(images)?;
        let after_all = &tokens[self.layers];
        let cls = self.teacher.layer(after_all)?.cls;
        Ok([cls.to_vec2()?, self.errors(&tokens)?.detach().to_vec2()?])
    }

    /// The student's parameters that the errors depend on.
    fn parameters(&self) -> Vec<(String, Var)> {
        let blocks = |(name, _): &(String, Var)| name.starts_with("blocks.");
        self.student
            .parameters()
            .into_iter()
            .filter(blocks)
            .collect()
    }
}

impl NoveltyDetector for TwoSpaces {
    fn preprocess(&self) -> &Preprocess {
        &self.preprocess
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn score(&self, images: &Tensor) -> Result<Vec<Novelty>, Error> {
        let [cls, errors] = self.pair.rows(images)?;
        let score = |(cls, errors): (Vec<f32>, Vec<f32>)| {
            self.pretrained.distance(&cls) + self.errors.distance(&errors)
        };
        Ok(unmapped(cls.into_iter().zip(errors).map(score).collect()))
    }
}

impl Method for Transformaly {
    fn fit(
        &self,
        teacher: &Teacher,
        normal: Arc<dyn Dataset>,
        seed: u64,
        observer: &mut dyn Observer,
    ) -> Result<Box<dyn NoveltyDetector>, Error> {
        let images = teacher.read(normal, observer)?;
        let mut rng = Rng::seed(seed);
        let spec = teacher.vit().spec().clone();
        let mut pair = Pair {
            student: Vit::random(spec, 0.0, &mut rng, teacher.device())?,
            teacher: Arc::clone(teacher.vit()),
            layers: self.layers.clamp(1, teacher.depth()),
        };
        let schedule = Schedule {
            blocks: pair.layers,
            epochs: self.epochs,
            batch_size: self.batch_size,
            learning_rate: self.learning_rate,
            weight_decay: 0.0,
        };
        train_by_loss(
            pair.parameters(),
            images.len(),
            &schedule,
            &mut rng,
            observer,
            &|batch, _| {
                let tokens = pair.tokens(&images.images(batch)?)?;
                Ok(pair.errors(&tokens)?.mean_all()?)
            },
        )?;
        pair.student = pair.student.copy(TrainScope::Frozen)?;

        let (mut cls, mut errors) = (Vec::new(), Vec::new());
        let indices: Vec<usize> = (0..images.len()).collect();
        for batch in indices.chunks(BATCH) {
            let [some_cls, some_errors] = pair.rows(&images.images(batch)?)?;
            cls.extend(some_cls);
            errors.extend(some_errors);
        }
        Ok(Box::new(TwoSpaces {
            pretrained: Gaussian::fit(&cls)?,
            errors: Gaussian::fit(&errors)?,
            pair,
            preprocess: teacher.preprocess().clone(),
            device: teacher.device().clone(),
        }))
    }

    fn name(&self) -> String {
        "Transformaly".into()
    }

    fn deviations(&self) -> &'static str {
        "AdamW at a constant learning rate; Ledoit and Wolf's covariances in place of whitening"
    }
}
