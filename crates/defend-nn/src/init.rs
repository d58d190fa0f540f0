//! Seeded initial values of parameters; candle cannot seed its own CPU generator.

use candle_core::{Device, Result, Shape, Tensor};
use defend_random::{Rng, standard_normal};
use rand::RngExt;

fn tensor(shape: Shape, device: &Device, mut draw: impl FnMut() -> f32) -> Result<Tensor> {
    let values: Vec<f32> = (0..shape.elem_count()).map(|_| draw()).collect();
    Tensor::from_vec(values, shape, device)
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
