//! Features, operations and the optimiser.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};

use defend_core::distill::{DistillObjective, FeatureDistance};
use defend_core::nn::{Rng, backward, normal, ops};
use defend_core::ot::{Assigner, SinkhornKnopp};
use defend_core::train::{AdamW, AdamWConfig, ParameterGroup};
use defend_core::vit::{
    Backbone, CacheConfig, Cached, ComputePrecision, Encoder, Precision, TokenSet, TrainScope,
    Trainable, Vit,
};

use crate::place::*;

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
