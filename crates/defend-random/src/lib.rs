//! Seeded streams of random numbers: same seed, same bits, on every platform.
//!
//! Everything random in `defend` draws from an [`Rng`]: initial weights, crops, masks, shuffles, samples, bootstraps.
//!
//! ```
//! use defend_random::{Rng, standard_normal};
//!
//! let draw = |mut rng: Rng| standard_normal(&mut rng);
//! assert_eq!(draw(Rng::seed(7)), draw(Rng::seed(7)));
//! assert_ne!(draw(Rng::stream(7, 1)), draw(Rng::stream(7, 2)));
//! ```

use std::convert::Infallible;

use rand::{RngExt, SeedableRng, TryRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// The one source of randomness of a run.
#[derive(Debug, Clone)]
pub struct Rng(ChaCha8Rng);

impl Rng {
    /// The generator of `seed`.
    pub fn seed(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// An independent generator of the same seed for one purpose, so that adding draws to one stage
    /// does not change another.
    pub fn stream(seed: u64, purpose: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(purpose);
        Self(rng)
    }

    /// Where the generator is, to go on from later.
    ///
    /// ```
    /// use defend_random::{Rng, standard_normal};
    ///
    /// let mut rng = Rng::stream(7, 1);
    /// standard_normal(&mut rng);
    /// let mut again = Rng::at(rng.position());
    /// assert_eq!(standard_normal(&mut rng), standard_normal(&mut again));
    /// ```
    pub fn position(&self) -> Position {
        Position {
            key: self.0.get_seed(),
            stream: self.0.get_stream(),
            // A run that drew 2^64 words would take centuries.
            word: u64::try_from(self.0.get_word_pos()).unwrap_or(u64::MAX),
        }
    }

    /// The generator at a position.
    pub fn at(position: Position) -> Self {
        let mut rng = ChaCha8Rng::from_seed(position.key);
        rng.set_stream(position.stream);
        rng.set_word_pos(u128::from(position.word));
        Self(rng)
    }
}

/// Where an [`Rng`] is in its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    key: [u8; 32],
    stream: u64,
    word: u64,
}

impl TryRng for Rng {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        self.0.try_next_u32()
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        self.0.try_next_u64()
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        self.0.try_fill_bytes(bytes)
    }
}

/// One draw of the standard normal distribution (Box-Muller).
pub fn standard_normal(rng: &mut Rng) -> f64 {
    // 1 - u lies in (0, 1], so the logarithm is finite.
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_of_the_standard_normal() {
        let mut rng = Rng::seed(1);
        let draws: Vec<f64> = (0..20_000).map(|_| standard_normal(&mut rng)).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let variance = draws.iter().map(|x| x * x).sum::<f64>() / draws.len() as f64;
        assert!(
            mean.abs() < 0.03 && (variance - 1.0).abs() < 0.04,
            "{mean} {variance}"
        );
    }
}

/// The README's example runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
