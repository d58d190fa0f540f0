//! Figures of merit, confidence intervals and thresholds for novelty scores, over `ndarray`.
//!
//! One convention holds everywhere: `abnormal` marks the positive class and a higher score means
//! more novel. Every input is checked; a NaN, a single class or two lengths are an [`Error`] and
//! never a silent 0.5.
//!
//! ```
//! use defend_metrics::{Auroc, FalseAlarmRate, Metric, threshold_for};
//! use ndarray::array;
//!
//! # fn main() -> Result<(), defend_metrics::Error> {
//! let scores = array![0.1, 0.4, 0.35, 0.8];
//! let abnormal = array![false, false, true, true];
//! assert!((Auroc.evaluate(scores.view(), abnormal.view())? - 0.75).abs() < 1e-12);
//!
//! let held_out = array![0.2, 0.1, 0.4, 0.3];
//! let threshold = threshold_for(held_out.view(), FalseAlarmRate::new(0.2)?)?;
//! assert!(threshold.is_novel(0.5) && !threshold.is_novel(0.4));
//! # Ok(())
//! # }
//! ```
//!
//! Pixel AUROC (MVTec AD) is [`auroc`] over the flattened maps and masks; [`pro`] weighs every
//! defect alike whatever its size.

#![allow(
    clippy::needless_pass_by_value,
    reason = "ndarray's views are two words and Copy, and its own functions take them by value"
)]

mod bootstrap;
mod conformal;
mod drift;
mod error;
mod experiments;
mod interval;
mod metric;
mod pro;
mod quantile;
mod roc;
mod sweep;
mod threshold;

pub use bootstrap::bootstrap_interval;
pub use conformal::{Promise, benjamini_hochberg, false_alarm_range, p_value};
pub use drift::{Drift, drift};
pub use error::{Class, Error};
pub use experiments::{Comparison, Experiment, compare, mean_interval};
pub use interval::{Interval, auroc_interval};
pub use metric::{
    Aupr, Auroc, Drawn, F1Max, FprAtTpr, Metric, auroc, average_precision, f1_max, fpr_at_tpr,
};
pub use pro::{PRO_FPR_LIMIT, pro};
pub use roc::{RocCurve, RocPoint};
pub use threshold::{FalseAlarmRate, Threshold, threshold_for};

/// The README's example runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
