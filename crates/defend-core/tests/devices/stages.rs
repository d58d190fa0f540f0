//! Training stages and distances.

use std::collections::HashMap;

use candle_core::{Tensor, Var};
use defend_core::dense::{
    Assignment, CropBox, DenseConfig, DenseObjective, DenseTuner, ProjectionHead,
    PrototypeObjective, Resampling, View, crop_targets,
};
use defend_core::distill::{
    Aggregation, DistillConfig, DistillRoles, Distiller, FeatureDistance, FeatureNorm, Mask,
    NormalizedSide, Penalty, Score, Selection, discrepancy,
};
use defend_core::nn::Rng;
use defend_core::train::Training;
use defend_core::vit::{Grid, TrainScope, Trainable};

use crate::place::*;

/// What two steps of a stage did.
struct Steps {
    losses: Vec<f64>,
    before: HashMap<String, Tensor>,
    parameters: Vec<(String, Var)>,
}

fn same_steps(found: &Steps, expected: &Steps) {
    all_close(&found.losses, &expected.losses, 1e-5, "losses");
    same_moves(&found.before, &found.parameters, &expected.parameters, 5e-4);
}

fn dense(place: &Place, config: &DenseConfig) -> Steps {
    let vit = place.vit(1, TrainScope::LastBlocks(2));
    let layer = |seed: u64, outputs: usize, inputs: usize| {
        let weight = (place.noise(&[outputs, inputs], seed) * 0.2).unwrap();
        (weight, place.noise(&[outputs], seed + 1))
    };
    let head = ProjectionHead::from_layers(&[layer(20, 32, 48), layer(30, 16, 32)]).unwrap();
    let objective = PrototypeObjective::new(
        head,
        &place.noise(&[5, 16], 40),
        Box::new(config.sinkhorn),
        config.assignment,
        config.temperature,
    )
    .unwrap()
    .with_resampling(config.resampling)
    .with_queue(config.queue);
    let parameters = [vit.parameters(), objective.parameters()].concat();
    let (before, mut losses) = (values(&parameters), Vec::new());
    let images = place.noise(&[4, 3, 32, 32], 8);
    DenseTuner::new(config.clone())
        .unwrap()
        .tune(
            &vit,
            &objective,
            &images,
            Training::new(&mut Rng::seed(9), &mut |step| {
                losses.push(step.loss);
                std::ops::ControlFlow::Continue(())
            }),
        )
        .unwrap();
    Steps {
        losses,
        before,
        parameters,
    }
}

#[test]
fn dense_steps() {
    let paper = DenseConfig {
        epochs: 2,
        batch_size: 4,
        crops: 2,
        crop_size: 16,
        backbone_learning_rate: 1e-3,
        head_learning_rate: 1e-3,
        ..DenseConfig::default()
    };
    let leopart = DenseConfig {
        view: View::Random {
            count: 2,
            area: [0.25, 1.0],
        },
        assignment: Assignment::Soft,
        resampling: Resampling::RoiAlign { side: 3 },
        queue: 100,
        target_momentum: Some(0.9),
        ..paper.clone()
    };
    for config in [paper, leopart] {
        let run = |place: &Place| dense(place, &config);
        same_steps(&run(&Place::best()), &run(&Place::reference()));
    }
}

#[test]
fn hard_targets_of_crops() {
    let run = |place: &Place| {
        let q = place.noise(&[2, 16, 5], 11);
        let at = |row, column| CropBox {
            row,
            column,
            height: 3,
            width: 2,
        };
        let boxes = [at(0, 0), at(1, 2)];
        let crop = Grid {
            rows: 2,
            columns: 2,
        };
        crop_targets(&q, &boxes, GRID, crop, Assignment::Hard, Resampling::Area).unwrap()
    };
    let found = run(&Place::best());
    close(&found, &run(&Place::reference()), 1e-6, "targets");
}

#[test]
fn masked_distillation_steps() {
    let run = |place: &Place| {
        let teacher = place.vit(1, TrainScope::Frozen).with_layers(2).unwrap();
        let student = place.vit(4, TrainScope::All).with_layers(2).unwrap();
        let parameters = student.parameters();
        let (before, mut losses) = (values(&parameters), Vec::new());
        let config = DistillConfig {
            epochs: 2,
            batch_size: 4,
            layers: 2,
            ..DistillConfig::default()
        };
        let mask = Mask::KeepSalient {
            ratio: 0.5,
            selection: Selection::TopK,
        };
        Distiller::new(config)
            .unwrap()
            .distill(
                DistillRoles {
                    teacher: &teacher,
                    student: &student,
                    mask: &mask,
                    objective: &FeatureDistance::default(),
                },
                &place.noise(&[6, 3, 32, 32], 12),
                Training::new(&mut Rng::seed(13), &mut |step| {
                    losses.push(step.loss);
                    std::ops::ControlFlow::Continue(())
                }),
            )
            .unwrap();
        Steps {
            losses,
            before,
            parameters,
        }
    };
    same_steps(&run(&Place::best()), &run(&Place::reference()));
}

#[test]
fn distances_of_images() {
    let mut kinds = Vec::new();
    for norm in [FeatureNorm::None, FeatureNorm::Layer, FeatureNorm::L2] {
        for side in [NormalizedSide::Both, NormalizedSide::Teacher] {
            for penalty in [Penalty::Squared, Penalty::SmoothL1] {
                kinds.push(FeatureDistance {
                    norm,
                    side,
                    penalty,
                });
            }
        }
    }
    kinds.retain(|kind| kind.validate().is_ok());
    let run = |place: &Place, kind: FeatureDistance| {
        let (teacher, student) = (
            place.vit(1, TrainScope::Frozen),
            place.vit(4, TrainScope::Frozen),
        );
        let images = place.noise(&[3, 3, 32, 32], 14);
        discrepancy(&teacher, &student, &kind, 1, &images).unwrap()
    };
    let aggregations = [
        Aggregation::Mean,
        Aggregation::AttentionWeighted,
        Aggregation::BestPatches { share: 0.3 },
        Aggregation::WorstPatches { share: 0.3 },
        Aggregation::Cls,
        Aggregation::PatchesAndCls { weight: 0.5 },
    ];
    for kind in kinds {
        let what = format!("{kind:?}");
        let (found, expected) = (run(&Place::best(), kind), run(&Place::reference(), kind));
        close(&found.patches, &expected.patches, 1e-5, &what);
        close(&found.cls, &expected.cls, 1e-5, &what);
        close(&found.attention, &expected.attention, 1e-5, &what);
        for aggregation in &aggregations {
            let scores = |d| -> Vec<f64> {
                let scores = aggregation.score(d).unwrap();
                scores.into_iter().map(f64::from).collect()
            };
            let what = format!("{what}, {aggregation:?}");
            all_close(&scores(&found), &scores(&expected), 1e-5, &what);
        }
    }
}
