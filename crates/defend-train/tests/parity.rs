//! The optimiser's steps and the schedules against PyTorch, from `tools/golden_nn.py`.

#![allow(clippy::unwrap_used, reason = "helpers of tests may panic")]

use candle_core::{Tensor, Var};
use defend_testing::{Golden, assert_close};
use defend_train::{AdamW, AdamWConfig, ParameterGroup, Schedule};

#[test]
fn optimiser_steps_match_torch_adamw() {
    let golden = Golden::read(env!("CARGO_MANIFEST_DIR"), "training");
    for (run, beta2, gradient_clip) in [
        ("short", 0.95, None),
        ("long", 0.999, None),
        ("clipped", 0.999, Some(6.0)),
    ] {
        let var = |p: &str| Var::from_tensor(&golden.get(&format!("adamw.init.{p}"))).unwrap();
        let vars = [("w", var("w")), ("b", var("b")), ("p", var("p"))];
        let group = |members: &[(&str, Var)], learning_rate, weight_decay| ParameterGroup {
            parameters: members
                .iter()
                .map(|(n, v)| ((*n).to_owned(), v.clone()))
                .collect(),
            learning_rate,
            weight_decay,
        };
        let groups = vec![group(&vars[..2], 1e-2, 0.1), group(&vars[2..], 1e-3, 0.0)];
        let config = AdamWConfig {
            beta2,
            gradient_clip,
            ..AdamWConfig::default()
        };
        let mut optimiser = AdamW::new(groups, config).unwrap();
        for step in 0..5 {
            // A store with the given gradients: that of sum(var * gradient).
            let terms: Vec<Tensor> = vars
                .iter()
                .map(|(name, var)| {
                    let grad = golden.get(&format!("adamw.grad.{name}.{step}"));
                    (var.as_tensor() * grad).unwrap().sum_all().unwrap()
                })
                .collect();
            let total = Tensor::stack(&terms, 0).unwrap().sum_all().unwrap();
            let norm = optimiser.step(&total.backward().unwrap(), 1.0).unwrap();
            let expected = golden.get(&format!("adamw.norm.{step}"));
            let expected = f64::from(expected.to_vec1::<f32>().unwrap()[0]);
            assert!((norm / expected - 1.0).abs() < 1e-6, "{norm} {expected}");
            for (name, var) in &vars {
                let what = format!("adamw.{run}.{name}.{step}");
                assert_close(var.as_tensor(), &golden.get(&what), 2e-6, &what);
            }
        }
    }
}

#[test]
fn schedules_match_their_formula() {
    let golden = Golden::read(env!("CARGO_MANIFEST_DIR"), "training");
    let schedules = golden.starting_with("schedule.");
    assert!(schedules.len() > 1);
    for (name, expected) in schedules {
        let (total, warmup) = name.split_once('_').unwrap();
        let (total, warmup): (usize, usize) = (total.parse().unwrap(), warmup.parse().unwrap());
        let (peak, last) = (1e-3, 1e-5);
        let schedule = Schedule::Cosine {
            warmup: warmup as f64 / total as f64,
            floor: last / peak,
        };
        let rates: Vec<f64> = (0..total)
            .map(|i| peak * schedule.multiplier(i, total))
            .collect();
        let rates = Tensor::new(rates, expected.device()).unwrap();
        assert_close(&rates, &expected, 1e-6, &name);
    }
}
