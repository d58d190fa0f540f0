//! What can go wrong when scores are judged.

use std::fmt;

/// One of the two classes of a novelty test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The class that was seen in training; negative.
    Normal,
    /// The novel class; positive.
    Abnormal,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Normal => "normal",
            Self::Abnormal => "abnormal",
        })
    }
}

/// Errors of `defend-metrics`.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is nothing to evaluate.
    #[error("no {what} were given, expected at least one")]
    Empty {
        /// What was asked for.
        what: &'static str,
    },
    /// Two inputs that go together differ in length.
    #[error("{left} {left_name} were given with {right} {right_name}, expected as many of each")]
    Length {
        /// Name of the first input.
        left_name: &'static str,
        /// Length of the first input.
        left: usize,
        /// Name of the second input.
        right_name: &'static str,
        /// Length of the second input.
        right: usize,
    },
    /// A score is NaN or infinite.
    #[error("score {index} is {value}, expected a finite number")]
    NotFinite {
        /// Position of the score, counted from 0; for maps, over all pixels in order.
        index: usize,
        /// The score.
        value: f64,
    },
    /// A class has too few samples for the figure that was asked for.
    #[error("the labels hold {found} {class} samples, expected at least {needed}")]
    TooFew {
        /// The class that is short.
        class: Class,
        /// Number of its samples.
        found: usize,
        /// Number that is needed.
        needed: usize,
    },
    /// A setting lies outside its range.
    #[error("{field} is {value}, expected {expected}")]
    Config {
        /// Name of the setting.
        field: &'static str,
        /// Value that was given.
        value: f64,
        /// What the setting accepts.
        expected: &'static str,
    },
    /// The held-out set cannot show that false alarms are as rare as asked for.
    #[error(
        "a false alarm rate of {rate} needs at least {needed} held-out normal images, found {found}: \
         add images or allow a higher rate"
    )]
    TooFewForRate {
        /// The false alarm rate that was asked for.
        rate: f64,
        /// Number of held-out normal scores.
        found: usize,
        /// Smallest number that allows this rate.
        needed: usize,
    },
    /// Too few held-out scores for a false alarm rate with confidence.
    #[error(
        "a false alarm rate of at most {rate} with {confidence} confidence needs at least {needed} held-out normal images, found \
         {found}: add images, or allow a higher rate or less confidence"
    )]
    TooFewForConfidence {
        /// The false alarm rate that was asked for.
        rate: f64,
        /// The confidence that was asked for.
        confidence: f64,
        /// Number of held-out normal scores.
        found: usize,
        /// Smallest number that allows this.
        needed: usize,
    },
    /// A score map and its mask differ in shape.
    #[error("score map {image} has shape {map:?}, expected {mask:?} as its mask")]
    MapShape {
        /// Position of the image, counted from 0.
        image: usize,
        /// Rows and columns of the score map.
        map: [usize; 2],
        /// Rows and columns of the mask.
        mask: [usize; 2],
    },
}
