//! Every parameter of a student gets its gradient, on whole images and on kept patches: against finite
//! differences along random directions.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

use candle_core::{Device, Tensor, Var};
use defend_nn::{Rng, normal};
use defend_vit::{Architecture, Backbone, BackboneSpec, Error, Grid, TokenSet, Trainable, Vit};

fn student() -> Vit {
    let spec = BackboneSpec::new(Architecture {
        image_size: 16,
        patch_size: 4,
        width: 24,
        depth: 2,
        heads: 3,
        mlp_width: 32,
        ..Architecture::vit_tiny()
    });
    Vit::random(spec, 0.0, &mut Rng::seed(4), &Device::Cpu).unwrap()
}

/// A gradient along a random direction against finite differences.
fn compare(
    name: &str,
    var: &Var,
    grad: Option<&Tensor>,
    rng: &mut Rng,
    loss: &mut dyn FnMut(&mut Rng) -> Result<Tensor, Error>,
) -> Result<(), Error> {
    let grad = grad.unwrap_or_else(|| panic!("{name} has no gradient"));
    let start = var.as_detached_tensor().copy()?;
    let direction = normal(var.dims(), 1.0, rng, &Device::Cpu)?;
    // Short against the CLS token, whose length LayerNorm divides by.
    let step = 2e-3 / (direction.elem_count() as f64).sqrt();
    let mut at = |sign: f64| -> Result<f64, Error> {
        var.set(&(&start + (&direction * (sign * step))?)?)?;
        Ok(f64::from(loss(rng)?.to_scalar::<f32>()?))
    };
    let numeric = (at(1.0)? - at(-1.0)?) / (2.0 * step);
    var.set(&start)?;
    let analytic = f64::from((grad * &direction)?.sum_all()?.to_scalar::<f32>()?);
    // f32 sums of a few hundred terms leave about 1e-5 in the loss.
    let allowed = 0.02 * analytic.abs() + 2e-5 / step;
    assert!(
        (numeric - analytic).abs() <= allowed,
        "{name}: gradient along a direction {analytic}, finite difference {numeric}"
    );
    let norm = grad.sqr()?.sum_all()?.to_scalar::<f32>()?;
    assert!(norm > 0.0, "{name}: the gradient is zero");
    Ok(())
}

fn check(keep: Option<&TokenSet>) -> Result<(), Error> {
    let (vit, mut rng) = (student(), Rng::seed(5));
    let images = normal((3, 3, 16, 16), 1.0, &mut rng, &Device::Cpu)?;
    let whole = vit.features(&images)?;
    let patches = match keep {
        Some(keep) => keep.gather(&whole.patches)?,
        None => whole.patches,
    };
    let (patch_weights, cls_weights) = (
        normal(patches.dims(), 1.0, &mut rng, &Device::Cpu)?,
        normal(whole.cls.dims(), 1.0, &mut rng, &Device::Cpu)?,
    );
    let loss = |rng: &mut Rng| -> Result<Tensor, Error> {
        let features = vit.features_train(&images, keep, rng)?;
        let patches = (features.patches * &patch_weights)?.sum_all()?;
        Ok((patches + (features.cls * &cls_weights)?.sum_all()?)?)
    };
    let grads = loss(&mut rng)?.backward()?;
    let parameters = vit.parameters();
    // Patch embedding and CLS token, final norm, 12 tensors a block; the positional embedding is fixed.
    assert_eq!(parameters.len(), 3 + 2 + 2 * 12);
    for (name, var) in parameters {
        compare(&name, &var, grads.get(&var), &mut rng, &mut |rng| loss(rng))?;
    }
    Ok(())
}

#[test]
fn whole_images() -> Result<(), Error> {
    check(None)
}

#[test]
fn kept_patches() -> Result<(), Error> {
    let grid = Grid {
        rows: 4,
        columns: 4,
    };
    let rows = [vec![0, 5, 9], vec![3, 4, 15], vec![1, 2, 8]];
    check(Some(&TokenSet::from_rows(&rows, grid, &Device::Cpu)?))
}

/// Blocks that learn alone, from another network's tokens.
#[test]
fn one_block() -> Result<(), Error> {
    let (vit, mut rng) = (student(), Rng::seed(6));
    let images = normal((2, 3, 16, 16), 1.0, &mut rng, &Device::Cpu)?;
    let tokens = vit.block_tokens(&images, 2)?;
    assert_eq!(tokens.len(), 3);
    for (i, pair) in tokens.windows(2).enumerate() {
        let alone = vit.run_block(i, &pair[0])?;
        let difference = (alone - &pair[1])?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(difference < 1e-6, "block {i}: {difference}");
    }
    assert_eq!(vit.block_tokens(&images, 0)?.len(), 1);
    assert!(vit.block_tokens(&images, 3).is_err() && vit.run_block(2, &tokens[0]).is_err());

    let weights = normal(tokens[0].dims(), 1.0, &mut rng, &Device::Cpu)?;
    let before = tokens[1].detach();
    let loss =
        || -> Result<Tensor, Error> { Ok((vit.run_block(1, &before)? * &weights)?.sum_all()?) };
    let grads = loss()?.backward()?;
    for (name, var) in vit.parameters() {
        if !name.starts_with("blocks.1.") {
            assert!(grads.get(&var).is_none(), "{name} is not in the block");
            continue;
        }
        compare(&name, &var, grads.get(&var), &mut rng, &mut |_| loss())?;
    }
    Ok(())
}
