//! AdamW's update.

use rayon::prelude::*;

use crate::{math, vectorised};

/// Elements a parallel task handles.
const ELEMENTS_PER_TASK: usize = 32 * 1024;

/// Constants of one step of AdamW for parameters that share a learning rate and a weight decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Decay of the gradient's running mean.
    pub beta1: f64,
    /// Decay of the squared gradient's running mean.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Learning rate over the first moment's bias correction, `rate / (1 - beta1^t)`.
    pub step_size: f64,
    /// Bias correction of the second moment's root, `1 / sqrt(1 - beta2^t)`.
    pub second_correction: f64,
    /// What the weight decay leaves of a parameter, `1 - rate * decay`.
    pub keep: f64,
}

/// Updates a parameter and its two moments, each read and written once.
pub fn update(
    parameter: &mut [f32],
    [first, second]: [&mut [f32]; 2],
    gradient: &[f32],
    step: &AdamWStep,
) {
    let AdamWStep { beta1, beta2, .. } = *step;
    // 1 - beta in f64: in f32 it would lose five digits for beta2 = 0.999.
    let [old1, new1] = [beta1 as f32, (1.0 - beta1) as f32];
    let [old2, new2] = [beta2 as f32, (1.0 - beta2) as f32];
    let (keep, size) = (step.keep as f32, step.step_size as f32);
    let correction = step.second_correction as f32;
    let eps = step.eps as f32;
    parameter
        .par_chunks_mut(ELEMENTS_PER_TASK)
        .zip(first.par_chunks_mut(ELEMENTS_PER_TASK))
        .zip(second.par_chunks_mut(ELEMENTS_PER_TASK))
        .zip(gradient.par_chunks(ELEMENTS_PER_TASK))
        .for_each(|(((parameter, first), second), gradient)| {
            vectorised!(|| {
                let moments = first.iter_mut().zip(second);
                for ((p, (m, v)), &g) in parameter.iter_mut().zip(moments).zip(gradient) {
                    *m = old1 * *m + new1 * g;
                    *v = old2 * *v + new2 * g * g;
                    *p = *p * keep - size * *m / (v.sqrt() * correction + eps);
                }
            });
        });
}

/// Sum of the squares, to the same bits with any number of threads.
pub fn sum_of_squares(values: &[f32]) -> f64 {
    let chunks = values.par_chunks(ELEMENTS_PER_TASK);
    let sums: Vec<f32> = chunks
        .map(|part| vectorised!(|| math::dot(part, part)))
        .collect();
    sums.into_iter().map(f64::from).sum()
}

/// Whether all values are finite: a sum of squares is not when one of them is not.
pub fn is_finite(values: &[f32]) -> bool {
    let chunks = values.par_chunks(ELEMENTS_PER_TASK);
    chunks.all(|part| vectorised!(|| math::dot(part, part)).is_finite())
}
