//! Metrics alone: figures of merit of scores from any detector, and a threshold with a promise.

use defend_metrics::{FalseAlarmRate, auroc, average_precision, threshold_for};
use ndarray::{Array1, Axis, concatenate};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let normal = Array1::from_iter((0..100).map(|i| f64::from(i % 37) / 37.0));
    let abnormal = Array1::from_iter((0..40).map(|i| 0.5 + f64::from(i % 29) / 29.0));
    let scores = concatenate(Axis(0), &[normal.view(), abnormal.view()])?;
    let truth = Array1::from_iter((0..140).map(|i| i >= 100));
    println!("AUROC {:.3}", auroc(scores.view(), truth.view())?);
    println!(
        "average precision {:.3}",
        average_precision(scores.view(), truth.view())?
    );
    let threshold = threshold_for(normal.view(), FalseAlarmRate::new(0.05)?)?;
    let caught = abnormal
        .iter()
        .filter(|score| threshold.is_novel(**score))
        .count();
    println!(
        "at 5 % false alarms the threshold is {:.3}: {caught} of 40 are caught",
        threshold.get()
    );
    Ok(())
}
