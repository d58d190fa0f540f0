//! Values and gradients against PyTorch, from `tools/golden_nn.py`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

use candle_core::{Result, Tensor, Var};
use defend_nn::ops;
use defend_testing::{Golden, assert_close};

/// Checks an operation's value and the gradients of its inputs; the golden names of both start with
/// `name`, those of the inputs with `of`.
fn check(
    name: &str,
    of: &str,
    inputs: &[&str],
    output: &str,
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let golden = Golden::read(env!("CARGO_MANIFEST_DIR"), "ops");
    let variable = |part: &&str| Var::from_tensor(&golden.get(&format!("{of}.{part}"))).unwrap();
    let vars: Vec<Var> = inputs.iter().map(variable).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let out = f(&tensors).unwrap();
    let expected = format!("{name}.{output}");
    assert_close(&out, &golden.get(&expected), 1e-5, &expected);
    let upstream = golden.get(&format!("{of}.g"));
    let grads = (out * upstream)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    for (var, part) in vars.iter().zip(inputs) {
        let expected = format!("{name}.d{part}");
        let grad = grads.get(var).unwrap_or_else(|| panic!("no {expected}"));
        // 3e-4: PyTorch's own f32 error at mean 100, where x has only five digits left.
        let tolerance = if name.ends_with("mean_100") {
            3e-4
        } else {
            2e-5
        };
        assert_close(grad, &golden.get(&expected), tolerance, &expected);
    }
}

#[test]
fn operations_match_pytorch() {
    let affine = ["x", "weight", "bias"];
    for name in ["layer_norm", "layer_norm_mean_100"] {
        check(name, name, &affine, "y", |t| {
            ops::layer_norm(&t[0], &t[1], &t[2], 1e-6)
        });
    }
    check("gelu", "gelu", &["x"], "y", |t| ops::gelu(&t[0]));
    check("linear", "linear", &affine, "y", |t| {
        ops::linear(&t[0], &t[1], &t[2])
    });
    check("linear_gelu", "linear", &affine, "y", |t| {
        ops::linear_gelu(&t[0], &t[1], &t[2])
    });
    check("attention", "attention", &["qkv"], "out", |t| {
        ops::attention(&t[0], 3)
    });
}

#[test]
fn cls_attention_matches_pytorch() -> Result<()> {
    let golden = Golden::read(env!("CARGO_MANIFEST_DIR"), "ops");
    let expected = golden
        .get("attention.weights")
        .narrow(2, 0, 1)?
        .squeeze(2)?;
    let expected = expected.narrow(2, 1, expected.dim(2)? - 1)?;
    let found = ops::cls_attention(&golden.get("attention.qkv"), 3)?;
    assert_close(&found, &expected, 1e-5, "CLS attention");
    Ok(())
}
