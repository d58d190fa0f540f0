//! LayerNorm of rows.

use super::math;
use super::panel_layout::{self, scatter};
use crate::vectorised;

/// Mean and reciprocal standard deviation of a row, in two passes.
#[inline(always)]
fn moments(row: &[f32], eps: f32) -> (f32, f32) {
    let n = row.len() as f32;
    let mean = math::sum(row) / n;
    let variance = math::squared_deviation(row, mean) / n;
    (mean, 1.0 / (variance + eps).sqrt())
}

/// One row.
#[inline(always)]
fn normalise(out: &mut [f32], x: &[f32], [weight, bias]: [&[f32]; 2], eps: f32) {
    let (mean, scale) = moments(x, eps);
    for (((o, &x), &w), &b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
        *o = (x - mean) * scale * w + b;
    }
}

/// Normalises the rows of `x` into `out`.
pub fn forward(out: &mut [f32], x: &[f32], [weight, bias]: [&[f32]; 2], eps: f32) {
    let d = weight.len();
    vectorised!(|| {
        for (out, x) in out.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
            normalise(out, x, [weight, bias], eps);
        }
    });
}

/// Normalises the rows of `x` into blocks, one slice `[rows, W]` for each.
pub fn forward_blocks(out: &mut [&mut [f32]], x: &[f32], [weight, bias]: [&[f32]; 2], eps: f32) {
    let d = weight.len();
    let width = panel_layout::width();
    let mut line = vec![0f32; d];
    vectorised!(|| {
        for (row, x) in x.chunks_exact(d).enumerate() {
            normalise(&mut line, x, [weight, bias], eps);
            scatter(out, row, &line, width);
        }
    });
}

/// Adds the gradient of the rows of `x` to `dx` and those of weight and bias to `sums` `[2 D]`, from the gradient `g` of
/// the output; with the bias, the output itself goes to `out` in blocks.
///
/// With n = (x - mean) / std and g' = g * w: dx = (g' - mean(g') - n mean(g' n)) / std.
pub fn backward(
    dx: &mut [f32],
    sums: &mut [f32],
    x: &[f32],
    g: &[f32],
    weight: &[f32],
    eps: f32,
    mut out: Option<(&mut [&mut [f32]], &[f32])>,
) {
    let d = weight.len();
    let width = panel_layout::width();
    let (dw, db) = sums.split_at_mut(d);
    let (mut line, mut scaled) = (vec![0f32; d], vec![0f32; d]);
    vectorised!(|| {
        let rows = x.chunks_exact(d).zip(g.chunks_exact(d));
        for (row, (dx, (x, g))) in dx.chunks_exact_mut(d).zip(rows).enumerate() {
            let (mean, scale) = moments(x, eps);
            // One row stays in the L1 cache, and loops over few slices become vector instructions.
            for (n, x) in line.iter_mut().zip(x) {
                *n = (x - mean) * scale;
            }
            for ((dw, g), n) in dw.iter_mut().zip(g).zip(&line) {
                *dw += g * n;
            }
            for (db, g) in db.iter_mut().zip(g) {
                *db += g;
            }
            for ((scaled, g), w) in scaled.iter_mut().zip(g).zip(weight) {
                *scaled = g * w;
            }
            let mean_g = math::sum(&scaled) / d as f32;
            let mean_gn = math::dot(&scaled, &line) / d as f32;
            for ((dx, scaled), n) in dx.iter_mut().zip(&scaled).zip(&line) {
                *dx += (scaled - mean_g - n * mean_gn) * scale;
            }
            if let Some((out, bias)) = &mut out {
                for ((n, w), b) in line.iter_mut().zip(weight).zip(*bias) {
                    *n = *n * w + b;
                }
                scatter(out, row, &line, width);
            }
        }
    });
}
