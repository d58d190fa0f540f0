//! Every stage on the best device of this build and machine, against a reference on the CPU.
//!
//! With a graphics card (`--features cuda` or `metal`) the reference is the CPU's result in `f32`. Without one the fused
//! `f32` kernels are compared with the same stage in `f64`, which runs the compositions that other devices run.

#![allow(clippy::unwrap_used, reason = "tests may panic")]

mod stripes;

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use defend_core::dense::{
    Assignment, CropBox, DenseConfig, DenseObjective, DenseTuner, ProjectionHead,
    PrototypeObjective, Resampling, View, crop_targets,
};
use defend_core::distill::{
    Aggregation, DistillConfig, DistillObjective, DistillRoles, Distiller, FeatureDistance,
    FeatureNorm, Mask, NormalizedSide, Penalty, Score, Selection, discrepancy,
};
use defend_core::nn::{Rng, backward, normal, ops};
use defend_core::ot::{Assigner, SinkhornKnopp};
use defend_core::prelude::*;
use defend_core::train::{AdamW, AdamWConfig, ParameterGroup, Training};
use defend_core::vit::{
    Architecture, Backbone, BackboneSpec, CacheConfig, Cached, ComputePrecision, Encoder, Features,
    Grid, Precision, TokenSet, TrainScope, Trainable, Vit, Weights,
};
use defend_core::{MaskedConfig, Student};
use defend_testing::{assert_close, assert_moved};
use stripes::{set, small_dense};

/// Where a stage runs, and in which type.
struct Place {
    device: Device,
    dtype: DType,
}

impl Place {
    fn best() -> Self {
        let device = best_device();
        eprintln!("on {:?}", device.location());
        Self {
            device,
            dtype: DType::F32,
        }
    }

    fn reference() -> Self {
        Self {
            device: Device::Cpu,
            dtype: if best_device().is_cpu() {
                DType::F64
            } else {
                DType::F32
            },
        }
    }

    fn put(&self, t: &Tensor) -> Tensor {
        let there = t.to_device(&self.device).unwrap();
        there.to_dtype(self.dtype).unwrap()
    }

    fn noise(&self, shape: &[usize], seed: u64) -> Tensor {
        self.put(&normal(shape, 1.0, &mut Rng::seed(seed), &Device::Cpu).unwrap())
    }

    /// A backbone of random weights, the same at every place.
    fn vit(&self, seed: u64, scope: TrainScope) -> Vit {
        self.vit_with(false, seed, scope)
    }

    fn vit_with(&self, layer_scale: bool, seed: u64, scope: TrainScope) -> Vit {
        let spec = BackboneSpec::new(Architecture {
            image_size: 32,
            patch_size: 8,
            width: 48,
            depth: 3,
            heads: 3,
            mlp_width: 96,
            layer_scale,
            ..Architecture::vit_tiny()
        });
        let random = Vit::random(spec.clone(), 0.0, &mut Rng::seed(seed), &Device::Cpu).unwrap();
        let state = random.state_dict().unwrap().into_iter();
        let state = state.map(|(name, t)| {
            // LayerScale starts with ones, which would hide its absence.
            let t = if name.ends_with("gamma") {
                normal(t.dims(), 1.0, &mut Rng::seed(50), &Device::Cpu).unwrap()
            } else {
                t
            };
            (name, self.put(&t))
        });
        let state = state.collect();
        Vit::load(
            spec,
            Weights::from_tensors(state, "random"),
            scope,
            &self.device,
        )
        .unwrap()
    }
}

const GRID: Grid = Grid {
    rows: 4,
    columns: 4,
};

fn at_home(t: &Tensor) -> Tensor {
    let home = t.to_device(&Device::Cpu).unwrap();
    home.to_dtype(DType::F64).unwrap()
}

/// Fails when the largest difference exceeds `tolerance` times the largest reference value.
fn close(found: &Tensor, expected: &Tensor, tolerance: f64, what: &str) {
    assert_close(&at_home(found), &at_home(expected), tolerance, what);
}

fn all_close(found: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    let tensor = |values: &[f64]| Tensor::new(values, &Device::Cpu).unwrap();
    close(&tensor(found), &tensor(expected), tolerance, what);
}

fn same_features(found: &Features, expected: &Features, tolerance: f64, what: &str) {
    let pairs = [
        ("CLS", &found.cls, &expected.cls),
        ("patches", &found.patches, &expected.patches),
        (
            "CLS attention",
            &found.cls_attention,
            &expected.cls_attention,
        ),
    ];
    for (name, found, expected) in pairs {
        close(found, expected, tolerance, &format!("{what}: {name}"));
    }
    assert_eq!(found.intermediates.len(), expected.intermediates.len());
    for (found, expected) in found.intermediates.iter().zip(&expected.intermediates) {
        let what = format!("{what}: earlier layer");
        close(&found.cls, &expected.cls, tolerance, &what);
        close(&found.patches, &expected.patches, tolerance, &what);
    }
}

/// Names and values of variables before they are trained.
fn values(parameters: &[(String, Var)]) -> HashMap<String, Tensor> {
    let copy = |(name, var): &(String, Var)| (name.clone(), at_home(&var.copy().unwrap()));
    parameters.iter().map(copy).collect()
}

/// Each parameter moved by `least`, and as far here as there.
fn same_moves(
    before: &HashMap<String, Tensor>,
    found: &[(String, Var)],
    expected: &[(String, Var)],
    least: f64,
) {
    assert_eq!((found.len(), expected.len()), (before.len(), before.len()));
    for ((name, found), (_, expected)) in found.iter().zip(expected) {
        let (found, expected) = (at_home(found.as_tensor()), at_home(expected.as_tensor()));
        assert_moved(name, &before[name], &found, &expected, least);
    }
}

#[test]
fn features() {
    for layer_scale in [false, true] {
        let run = |place: &Place| {
            let vit = place.vit_with(layer_scale, 1, TrainScope::Frozen);
            let vit = vit.with_layers(2).unwrap();
            let images = place.noise(&[3, 3, 32, 32], 2);
            let keep = [vec![0, 5, 9], vec![3, 4, 15], vec![1, 2, 8]];
            let keep = TokenSet::from_rows(&keep, GRID, &place.device).unwrap();
            let whole = vit.features(&images).unwrap();
            // What a nearest-neighbour search does with CLS tokens.
            let products = whole.cls.matmul(&whole.cls.t().unwrap()).unwrap();
            let kept = vit.features_masked(&images, &keep).unwrap();
            let larger = vit.features(&place.noise(&[1, 3, 48, 40], 3)).unwrap();
            (whole, kept, larger, products)
        };
        let (found, expected) = (run(&Place::best()), run(&Place::reference()));
        same_features(&found.0, &expected.0, 1e-5, "whole images");
        same_features(&found.1, &expected.1, 1e-5, "kept patches");
        same_features(&found.2, &expected.2, 1e-5, "another size");
        close(&found.3, &expected.3, 1e-5, "products of CLS tokens");
    }
}

#[test]
fn features_in_half_precision() {
    let place = Place::best();
    let vit = place.vit(1, TrainScope::Frozen);
    let images = place.noise(&[3, 3, 32, 32], 2);
    let expected = vit.features(&images).unwrap();
    for (half, tolerance) in [(DType::BF16, 3e-2), (DType::F16, 4e-3)] {
        let found = vit.to_dtype(half).unwrap().features(&images).unwrap();
        same_features(&found, &expected, tolerance, half.as_str());
    }
}

/// A block with heads of 64 channels, for which GPUs have an attention of their own in half precision: tokens that fill its
/// tiles, or do not.
#[test]
fn attention_of_any_length() {
    let (width, heads) = (128, 2);
    let best = Place::best();
    let types = if best.device.is_cpu() {
        vec![(DType::F32, 1e-5)]
    } else {
        vec![(DType::BF16, 2e-2), (DType::F16, 3e-3)]
    };
    for (dtype, tolerance) in types {
        // Both sides begin with the values that `dtype` has.
        let noise = |place: &Place, shape: &[usize], std: f64, seed: u64| {
            let values = normal(shape, std, &mut Rng::seed(seed), &Device::Cpu).unwrap();
            place.put(&values.to_dtype(dtype).unwrap())
        };
        let run = |place: &Place, tokens: usize| {
            let pair = |weight: &[usize], std, seed| {
                let bias = noise(place, &weight[..1], 0.5, seed + 1);
                [noise(place, weight, std, seed), bias]
            };
            let parameters = ops::BlockParameters {
                norm1: pair(&[width], 1.0, 80),
                qkv: pair(&[3 * width, width], 0.15, 82),
                projection: pair(&[width, width], 0.3, 84),
                norm2: pair(&[width], 1.0, 86),
                fc1: pair(&[64, width], 0.1, 88),
                fc2: pair(&[width, 64], 0.1, 90),
                scales: None,
                heads,
                eps: 1e-6,
                compute_precision: ComputePrecision::F32,
                prepared: ops::Prepared::default(),
            };
            let x = noise(place, &[3, tokens, width], 1.0, 92);
            let (out, cls) = ops::transformer_block(&x, &parameters, None, true).unwrap();
            (out, cls.unwrap())
        };
        for tokens in [2, 15, 16, 17, 63, 64, 65, 99, 197, 300] {
            let place = Place {
                dtype,
                ..Place::best()
            };
            let (found, expected) = (run(&place, tokens), run(&Place::reference(), tokens));
            let what = format!("{tokens} tokens in {}", dtype.as_str());
            close(&found.0, &expected.0, tolerance, &what);
            close(
                &found.1,
                &expected.1,
                tolerance,
                &format!("{what}: CLS attention"),
            );
        }
    }
}

#[test]
fn features_from_a_folder() {
    let (place, folder) = (Place::best(), tempfile::tempdir().unwrap());
    let images = place.noise(&[5, 3, 32, 32], 2);
    let plain = place.vit(1, TrainScope::Frozen).features(&images).unwrap();
    for round in ["computed", "read"] {
        let config = CacheConfig {
            memory_bytes: 0,
            folder: Some(folder.path().into()),
            precision: Precision::Full,
        };
        let vit = Arc::new(place.vit(1, TrainScope::Frozen));
        let cached = Cached::new(vit, config).unwrap();
        same_features(&cached.features(&images).unwrap(), &plain, 0.0, round);
    }
}

/// Operands that kernels cannot take as they are: views that begin anywhere, and shapes that are broadcast.
#[test]
fn operands_of_any_kind() {
    let run = |place: &Place| {
        let wide = place.noise(&[1, 41], 70);
        let x = wide.narrow(1, 1, 40).unwrap().reshape((5, 8)).unwrap();
        let at = Tensor::new(&[9u32, 4, 0, 4], &place.device).unwrap();
        let at = at.narrow(0, 1, 3).unwrap();
        let table = Var::from_tensor(&x).unwrap();
        let picked = ops::pick_rows(table.as_tensor(), &at).unwrap();
        let loss = picked.sqr().unwrap().sum_all().unwrap();
        let gradient = loss.backward().unwrap().get(&table).unwrap().clone();
        let weight = place.noise(&[8, 8], 71);
        let (scale, shift) = (place.noise(&[8], 72), place.noise(&[5, 8], 73));
        let one = shift.get(0).unwrap();
        vec![
            picked,
            gradient,
            ops::l2_normalize(&x).unwrap(),
            ops::layer_norm(&x, &scale, &one, 1e-6).unwrap(),
            ops::linear(&x, &weight, &one).unwrap(),
            ops::linear_gelu(&x, &weight, &one).unwrap(),
            ops::add_bias(&x, &shift).unwrap(),
        ]
    };
    let (found, expected) = (run(&Place::best()), run(&Place::reference()));
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        close(found, expected, 1e-5, &format!("result {i}"));
    }
}

/// A training pass, its gradients, and three steps of AdamW.
fn trained(place: &Place, student: &Vit) -> Trained {
    let parameters = student.parameters();
    let before = values(&parameters);
    let group = ParameterGroup {
        parameters: parameters.clone(),
        learning_rate: 1e-3,
        weight_decay: 0.05,
    };
    // With the usual eps of 1e-8 the smallest gradients would show nothing but their rounding.
    let config = AdamWConfig {
        eps: 1e-5,
        ..AdamWConfig::default()
    };
    let mut optimiser = AdamW::new(vec![group], config).unwrap();
    let images = place.noise(&[2, 3, 32, 32], 5);
    let target = place.noise(&[2, 4, 48], 6);
    let keep = [vec![0, 5, 9, 11], vec![3, 4, 12, 15]];
    let keep = TokenSet::from_rows(&keep, GRID, &place.device).unwrap();
    let (mut rng, mut gradients) = (Rng::seed(0), Vec::new());
    for _ in 0..3 {
        let found = student
            .features_train(&images, Some(&keep), &mut rng)
            .unwrap();
        let distances = FeatureDistance::default().distances(&target, &found.patches);
        let loss = distances.unwrap().mean_all().unwrap();
        let cls = found.cls.sqr().unwrap().mean_all().unwrap();
        let grads = backward(&(loss + cls).unwrap()).unwrap();
        optimiser.step(&grads, 1.0).unwrap();
        if gradients.is_empty() {
            let of = |(_, var): &(String, Var)| at_home(grads.get(var).unwrap());
            gradients = parameters.iter().map(of).collect();
        }
    }
    Trained {
        before,
        gradients,
        parameters,
    }
}

struct Trained {
    before: HashMap<String, Tensor>,
    /// Of the first step.
    gradients: Vec<Tensor>,
    parameters: Vec<(String, Var)>,
}

fn same_training(found: &Trained, expected: &Trained) {
    let pairs = found.gradients.iter().zip(&expected.gradients);
    for ((found, expected), (name, _)) in pairs.zip(&expected.parameters) {
        close(found, expected, 5e-5, &format!("gradient of {name}"));
    }
    same_moves(&found.before, &found.parameters, &expected.parameters, 5e-4);
}

#[test]
fn a_students_gradients_and_steps() {
    for layer_scale in [false, true] {
        let run = |place: &Place| trained(place, &place.vit_with(layer_scale, 4, TrainScope::All));
        same_training(&run(&Place::best()), &run(&Place::reference()));
    }
}

/// Says something with a graphics card only: students with stochastic depth are made in `f32`.
#[test]
fn stochastic_depth() {
    let run = |place: &Place| {
        let place = Place {
            device: place.device.clone(),
            dtype: DType::F32,
        };
        let spec = place.vit(4, TrainScope::Frozen).spec().clone();
        let student = Vit::random(spec, 0.4, &mut Rng::seed(4), &place.device).unwrap();
        trained(&place, &student)
    };
    same_training(&run(&Place::best()), &run(&Place::reference()));
}

#[test]
fn adamw_in_half_precision() {
    let place = Place::best();
    let run = |dtype: DType| {
        let put = |seed| place.noise(&[40, 7], seed).to_dtype(dtype).unwrap();
        let var = Var::from_tensor(&put(60)).unwrap();
        let group = ParameterGroup {
            parameters: vec![("weight".into(), var.clone())],
            learning_rate: 0.1,
            weight_decay: 0.5,
        };
        let mut optimiser = AdamW::new(vec![group], AdamWConfig::default()).unwrap();
        for seed in 61..64 {
            let grads = (var.as_tensor() * put(seed)).unwrap();
            let grads = grads.sum_all().unwrap().backward().unwrap();
            optimiser.step(&grads, 1.0).unwrap();
        }
        var.as_tensor().to_dtype(DType::F32).unwrap()
    };
    let expected = run(DType::F32);
    close(&run(DType::BF16), &expected, 3e-2, "bf16");
    close(&run(DType::F16), &expected, 4e-3, "f16");
}

#[test]
fn sinkhorn_knopp() {
    let run = |place: &Place| {
        let scores = place.noise(&[600, 7], 7).tanh().unwrap();
        SinkhornKnopp::default().assign(&scores).unwrap()
    };
    let found = run(&Place::best());
    close(&found, &run(&Place::reference()), 1e-5, "Q");
}

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
            Training::new(&mut Rng::seed(9), &mut |step| losses.push(step.loss)),
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
                Training::new(&mut Rng::seed(13), &mut |step| losses.push(step.loss)),
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

fn scores(detector: &Detector) -> Vec<f64> {
    let of = |period| scan(detector, set(period, 5), &mut Silent).unwrap();
    [of(3).scores(), of(5).scores()].concat()
}

/// One epoch of the dense stage and two of distillation.
fn short() -> DefendConfig {
    DefendConfig {
        dense: Some(DenseConfig {
            batch_size: 4,
            ..small_dense()
        }),
        student: Student::Masked(MaskedConfig {
            distill: DistillConfig {
                epochs: 2,
                batch_size: 4,
                ..DistillConfig::default()
            },
            ..MaskedConfig::default()
        }),
        ..DefendConfig::default()
    }
}

#[test]
fn a_whole_fit_and_its_file() {
    let run = |place: &Place| {
        let fitted = Defend::builder()
            .device(place.device.clone())
            .teacher(place.vit(1, TrainScope::Frozen))
            .student(Arc::new(place.vit(4, TrainScope::All)))
            .config(short())
            .fit(set(3, 8), &mut Silent)
            .unwrap();
        let distilled = fitted.distill().unwrap().losses.clone();
        (fitted.detector, fitted.dense.unwrap().losses, distilled)
    };
    let place = Place::best();
    let (found, expected) = (run(&place), run(&Place::reference()));
    all_close(&found.1, &expected.1, 1e-4, "losses of the dense stage");
    all_close(&found.2, &expected.2, 1e-4, "losses of the distillation");
    let before = scores(&found.0);
    all_close(&before, &scores(&expected.0), 1e-3, "scores");

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stripes.defend");
    found.0.save(&path).unwrap();
    let there = Detector::load(&path, &place.device).unwrap();
    assert_eq!(scores(&there), before);
    let home = Detector::load(&path, &Device::Cpu).unwrap();
    all_close(&scores(&home), &before, 1e-5, "scores of the loaded model");
}

#[test]
fn a_whole_fit_in_bf16_and_its_file() {
    let run = |place: &Place, compute_precision: ComputePrecision| {
        let config = DefendConfig {
            compute_precision,
            ..short()
        };
        let builder = Defend::builder()
            .device(place.device.clone())
            .teacher(place.vit(1, TrainScope::Frozen));
        let fitted = builder.config(config).fit(set(3, 8), &mut Silent);
        fitted.unwrap().detector
    };
    let place = Place::best();
    let found = run(&place, ComputePrecision::Bf16);
    let before = scores(&found);
    let expected = scores(&run(&place, ComputePrecision::F32));
    all_close(&before, &expected, 5e-2, "scores");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stripes.defend");
    found.save(&path).unwrap();
    let there = Detector::load(&path, &place.device).unwrap();
    assert_eq!(scores(&there), before);
    let home = Detector::load(&path, &Device::Cpu).unwrap();
    all_close(&scores(&home), &before, 2e-2, "scores of the loaded model");
}

/// The closed form itself is computed on the processor; its teacher is not.
#[test]
fn a_whole_fit_in_closed_form_and_its_file() {
    let run = |place: &Place, compute_precision: ComputePrecision| {
        let config = DefendConfig {
            compute_precision,
            ..DefendConfig::default()
        };
        let builder = Defend::builder()
            .device(place.device.clone())
            .teacher(place.vit(1, TrainScope::Frozen));
        let fitted = builder.config(config).fit(set(3, 8), &mut Silent);
        fitted.unwrap().detector
    };
    let place = Place::best();
    let found = run(&place, ComputePrecision::F32);
    let before = scores(&found);
    let expected = scores(&run(&Place::reference(), ComputePrecision::F32));
    all_close(&before, &expected, 1e-2, "scores");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stripes.defend");
    found.save(&path).unwrap();
    let there = Detector::load(&path, &place.device).unwrap();
    assert_eq!(scores(&there), before);
    let rounded = scores(&run(&place, ComputePrecision::Bf16));
    assert!(rounded.iter().all(|score| score.is_finite()));
}
