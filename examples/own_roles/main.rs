//! Every stage is a role: this program replaces them one by one by implementations of its own.
//!
//! It fits on rendered images in under a minute: `cargo run --release --bin own_roles`

use std::sync::Arc;

use anyhow::Result;
use candle_core::D;
use defend_core::data::Preprocess;
use defend_core::dense::{Assignment, DenseConfig, ProjectionHead, PrototypeObjective};
use defend_core::distill::{Discrepancy, DistillConfig, DistillObjective, MaskPolicy, Score};
use defend_core::nn::{Rng, normal, ops};
use defend_core::ot::Assigner;
use defend_core::prelude::*;
use defend_core::vit::{
    Architecture, Backbone, BackboneSpec, Encoder, Features, Grid, Layer, TokenSet, TrainScope, Vit,
};
use defend_core::{MaskedConfig, Novelty, Observer, Student, Tensor};
use defend_scenes::{SceneConfig, SceneSet};

/// Assigner: each patch to its prototypes by softmax, without the balance of optimal transport.
struct Unbalanced;

impl Assigner for Unbalanced {
    fn assign(&self, scores: &Tensor) -> Result<Tensor, defend_core::ot::Error> {
        Ok(candle_nn::ops::softmax(&(scores / 0.05)?, D::Minus1)?)
    }
}

/// Mask: the student sees the black squares of a chessboard.
struct Chessboard;

impl MaskPolicy for Chessboard {
    fn keep(
        &self,
        attention: &Tensor,
        grid: Grid,
        _: &mut Rng,
    ) -> Result<Option<TokenSet>, defend_core::distill::Error> {
        let black = |i: &usize| (i / grid.columns + i % grid.columns).is_multiple_of(2);
        let kept: Vec<u32> = (0..grid.patches())
            .filter(black)
            .map(|i| i as u32)
            .collect();
        let rows = vec![kept; attention.dim(0)?];
        Ok(Some(TokenSet::from_rows(&rows, grid, attention.device())?))
    }
}

/// Distance: one minus the cosine.
struct Cosine;

impl DistillObjective for Cosine {
    fn distances(
        &self,
        teacher: &Tensor,
        student: &Tensor,
    ) -> Result<Tensor, defend_core::distill::Error> {
        let (t, s) = (ops::l2_normalize(teacher)?, ops::l2_normalize(student)?);
        Ok((1.0 - (t * s)?.sum(D::Minus1)?)?)
    }
}

/// Score: the median patch, which a few odd patches do not move.
struct Median;

impl Score for Median {
    fn score(&self, found: &Discrepancy) -> Result<Vec<f32>, defend_core::distill::Error> {
        let rows = found.patches.to_vec2::<f32>()?;
        let median = |mut row: Vec<f32>| {
            row.sort_by(f32::total_cmp);
            row.get(row.len() / 2).copied().unwrap_or(f32::NAN)
        };
        Ok(rows.into_iter().map(median).collect())
    }
}

/// Backbone: the mean of an image and its mirror image, by any other backbone.
struct Mirrored<B>(B);

impl<B: Encoder> Encoder for Mirrored<B> {
    fn spec(&self) -> &BackboneSpec {
        self.0.spec()
    }

    fn intermediates(
        &self,
        images: &Tensor,
        blocks: &[usize],
    ) -> Result<Vec<Layer>, defend_core::vit::Error> {
        let plain = self.0.intermediates(images, blocks)?;
        let mirrored = self.0.intermediates(&images.flip(&[3])?, blocks)?;
        let Grid { rows, columns } = self.0.spec().architecture.grid();
        let layers = plain.into_iter().zip(mirrored).map(|(plain, mirrored)| {
            let (b, n, d) = plain.patches.dims3()?;
            let back = mirrored.patches.reshape((b, rows, columns, d))?;
            let back = back.flip(&[2])?.reshape((b, n, d))?;
            Ok(Layer {
                cls: ((plain.cls + mirrored.cls)? / 2.0)?,
                patches: ((plain.patches + back)? / 2.0)?,
            })
        });
        layers.collect()
    }
}

impl<B: Backbone> Backbone for Mirrored<B> {
    fn features(&self, images: &Tensor) -> Result<Features, defend_core::vit::Error> {
        let plain = self.0.features(images)?;
        let mirrored = self.0.features(&images.flip(&[3])?)?;
        let (b, n, d) = plain.patches.dims3()?;
        let Grid { rows, columns } = plain.grid;
        let back = mirrored.patches.reshape((b, rows, columns, d))?;
        let back = back.flip(&[2])?.reshape((b, n, d))?;
        Ok(Features {
            cls: ((plain.cls + mirrored.cls)? / 2.0)?,
            patches: ((plain.patches + back)? / 2.0)?,
            ..plain
        })
    }

    fn features_masked(
        &self,
        images: &Tensor,
        keep: &TokenSet,
    ) -> Result<Features, defend_core::vit::Error> {
        let mut features = self.features(images)?;
        features.patches = keep.gather(&features.patches)?;
        Ok(features)
    }
}

/// Detector: the length of the teacher's last CLS token; nothing is learnt at all.
struct Loudness<'a> {
    detector: &'a Detector,
}

impl NoveltyDetector for Loudness<'_> {
    fn preprocess(&self) -> &Preprocess {
        self.detector.preprocess()
    }

    fn device(&self) -> &Device {
        self.detector.device()
    }

    fn score(&self, images: &Tensor) -> Result<Vec<Novelty>, defend_core::Error> {
        let layers = self.detector.teacher().intermediates(images, &[2])?;
        let mut all = Vec::new();
        for Layer { cls, .. } in layers {
            let lengths = cls.sqr()?.sum(1)?.sqrt()?.to_vec1::<f32>()?;
            all.extend(lengths.into_iter().map(|l| Novelty::of_score(f64::from(l))));
        }
        Ok(all)
    }
}

/// Observer: counts events.
#[derive(Default)]
struct Counter(usize);

impl Observer for Counter {
    fn on(&mut self, _: &defend_core::Event<'_>) {
        self.0 += 1;
    }
}

fn main() -> Result<()> {
    let mut rng = Rng::seed(1);
    let scenes = SceneSet::render(&SceneConfig {
        train: 24,
        calibration: 20,
        test: 12,
        size: 64,
        ..SceneConfig::default()
    })?;
    let spec = BackboneSpec::new(Architecture {
        image_size: 64,
        patch_size: 8,
        width: 48,
        depth: 3,
        heads: 3,
        mlp_width: 96,
        ..Architecture::vit_tiny()
    });
    let teacher = Vit::random(spec.clone(), 0.0, &mut rng, &Device::Cpu)?;

    // Assigner, mask, distance, score and observer, in the library's own stages.
    let dense = DenseConfig {
        crop_size: 32,
        trained_blocks: 1,
        ..DenseConfig::default()
    };
    let head = ProjectionHead::random(&[48, 64, 16], &mut rng, &Device::Cpu)?;
    let prototypes = normal((6, 16), 1.0, &mut rng, &Device::Cpu)?;
    let objective = PrototypeObjective::new(
        head,
        &prototypes,
        Box::new(Unbalanced),
        Assignment::Soft,
        0.1,
    )?;
    let masked = Student::Masked(MaskedConfig {
        distill: DistillConfig {
            epochs: 2,
            min_steps: 0,
            cls_weight: 1.0,
            ..DistillConfig::default()
        },
        ..MaskedConfig::default()
    });
    let mut counter = Counter::default();
    let fitted = Defend::builder()
        .teacher(teacher.copy(TrainScope::Frozen)?)
        .config(DefendConfig {
            dense: Some(dense),
            student: masked.clone(),
            ..DefendConfig::default()
        })
        .dense_objective(Box::new(objective))
        .mask(Box::new(Chessboard))
        .objective(Arc::new(Cosine))
        .score(Arc::new(Median))
        .fit(scenes.train.clone(), &mut counter)?;
    println!(
        "own assigner, mask, distance and score: {} events",
        counter.0
    );
    print_scores(&fitted.detector, &scenes)?;

    // Teacher and student.
    let student = Vit::random(spec, 0.1, &mut rng, &Device::Cpu)?;
    let fitted = Defend::builder()
        .teacher(defend_core::TeacherSource::Backbone(Arc::new(Mirrored(
            teacher,
        ))))
        .student(Arc::new(student))
        .config(DefendConfig {
            student: masked,
            ..DefendConfig::default()
        })
        .fit(scenes.train.clone(), &mut Silent)?;
    println!("own teacher and student:");
    print_scores(&fitted.detector, &scenes)?;

    // A detector that shares nothing with the library's.
    println!("own detector:");
    print_scores(
        &Loudness {
            detector: &fitted.detector,
        },
        &scenes,
    )
}

fn print_scores(detector: &dyn NoveltyDetector, scenes: &SceneSet) -> Result<()> {
    for finding in scan(detector, scenes.test_normal.clone(), &mut Silent)?.findings {
        println!("  {:.4} {}", finding.novelty.score, finding.name);
    }
    Ok(())
}
