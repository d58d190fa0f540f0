//! Seeded random numbers and the initial values of parameters.

use std::convert::Infallible;

use candle_core::{Device, Result, Shape, Tensor};
use rand::{RngExt, SeedableRng, TryRng};
use rand_chacha::ChaCha8Rng;

/// The one source of randomness of a run: same seed, same bits, on every platform.
///
/// candle cannot seed its CPU generator, so initial weights, crops, masks, shuffles and drop path all
/// draw from here.
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
}

impl TryRng for Rng {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> std::result::Result<u32, Infallible> {
        self.0.try_next_u32()
    }

    fn try_next_u64(&mut self) -> std::result::Result<u64, Infallible> {
        self.0.try_next_u64()
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> std::result::Result<(), Infallible> {
        self.0.try_fill_bytes(bytes)
    }
}

fn tensor(shape: Shape, device: &Device, mut draw: impl FnMut() -> f32) -> Result<Tensor> {
    let values: Vec<f32> = (0..shape.elem_count()).map(|_| draw()).collect();
    Tensor::from_vec(values, shape, device)
}

/// One draw of the standard normal distribution (Box-Muller).
fn standard_normal(rng: &mut Rng) -> f64 {
    // 1 - u lies in (0, 1], so the logarithm is finite.
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()
}

/// Values of a normal distribution with mean 0, `f32`.
///
/// # Errors
/// When candle cannot allocate.
pub fn normal(shape: impl Into<Shape>, std: f64, rng: &mut Rng, device: &Device) -> Result<Tensor> {
    tensor(shape.into(), device, || (standard_normal(rng) * std) as f32)
}

/// As [`normal`], draws beyond two standard deviations repeated (the ViT's `trunc_normal_`).
///
/// # Errors
/// When candle cannot allocate.
pub fn truncated_normal(
    shape: impl Into<Shape>,
    std: f64,
    rng: &mut Rng,
    device: &Device,
) -> Result<Tensor> {
    tensor(shape.into(), device, || {
        loop {
            let value = standard_normal(rng);
            if value.abs() <= 2.0 {
                return (value * std) as f32;
            }
        }
    })
}

/// Glorot's uniform initialisation of a linear weight `[outputs, inputs]`, as MAE initialises its
/// transformer (METHOD.md, section 2).
///
/// # Errors
/// When candle cannot allocate.
pub fn xavier_uniform(
    outputs: usize,
    inputs: usize,
    rng: &mut Rng,
    device: &Device,
) -> Result<Tensor> {
    let bound = (6.0 / (inputs + outputs) as f64).sqrt() as f32;
    tensor((outputs, inputs).into(), device, || {
        rng.random_range(-bound..bound)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_bits_and_streams_differ() -> Result<()> {
        let draw = |mut rng: Rng| normal(64, 1.0, &mut rng, &Device::Cpu)?.to_vec1::<f32>();
        assert_eq!(draw(Rng::seed(7))?, draw(Rng::seed(7))?);
        assert_ne!(draw(Rng::seed(7))?, draw(Rng::seed(8))?);
        assert_ne!(draw(Rng::stream(7, 1))?, draw(Rng::stream(7, 2))?);
        Ok(())
    }

    #[test]
    fn moments_and_bounds_are_as_asked() -> Result<()> {
        let mut rng = Rng::seed(1);
        let x = normal(20_000, 0.5, &mut rng, &Device::Cpu)?;
        let variance = x.sqr()?.mean_all()?.to_scalar::<f32>()?;
        assert!((variance - 0.25).abs() < 0.01, "{variance}");
        let x = truncated_normal(20_000, 0.02, &mut rng, &Device::Cpu)?;
        assert!(x.abs()?.max(0)?.to_scalar::<f32>()? <= 0.04);
        let x = xavier_uniform(30, 20, &mut rng, &Device::Cpu)?;
        let bound = (6.0f32 / 50.0).sqrt();
        let top = x.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        assert!(top <= bound && top > 0.95 * bound);
        Ok(())
    }
}
