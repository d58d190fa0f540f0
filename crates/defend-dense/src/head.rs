//! The projection head g.

use candle_core::{Device, Tensor, Var};
use defend_nn::{Rng, ops, xavier_uniform};

use crate::Error;

/// Linear maps with GELU between them, L2-normalised at the end: `z = L2norm(g(Psi(x)))`
/// (paper, section 3.1).
#[derive(Debug)]
pub struct ProjectionHead {
    layers: Vec<(Var, Var)>,
}

impl ProjectionHead {
    /// Random weights for `widths`: input, hidden widths, output.
    ///
    /// # Errors
    /// [`Error::Candle`] when the parameters cannot be allocated.
    pub fn random(widths: &[usize], rng: &mut Rng, device: &Device) -> Result<Self, Error> {
        let layers = widths
            .windows(2)
            .map(|pair| {
                let (inputs, outputs) = (pair[0], pair[1]);
                let weight = Var::from_tensor(&xavier_uniform(outputs, inputs, rng, device)?)?;
                let bias = Var::zeros(outputs, weight.dtype(), device)?;
                Ok((weight, bias))
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self { layers })
    }

    /// A head from weights `[O, I]` and biases `[O]`, first layer first.
    ///
    /// # Errors
    /// [`Error::Candle`] when the parameters cannot be allocated.
    pub fn from_layers(layers: &[(Tensor, Tensor)]) -> Result<Self, Error> {
        let layers = layers
            .iter()
            .map(|(weight, bias)| Ok((Var::from_tensor(weight)?, Var::from_tensor(bias)?)))
            .collect::<Result<_, Error>>()?;
        Ok(Self { layers })
    }

    /// Unit vectors: `[B, N, D_v]` to `[B, N, D]`, differentiable.
    ///
    /// # Errors
    /// [`Error::Candle`] when the width does not fit.
    pub fn forward(&self, patches: &Tensor) -> Result<Tensor, Error> {
        self.run(patches, |var| var.as_tensor().clone())
    }

    /// As [`ProjectionHead::forward`], without recording gradients.
    ///
    /// # Errors
    /// As [`ProjectionHead::forward`].
    pub fn forward_detached(&self, patches: &Tensor) -> Result<Tensor, Error> {
        self.run(&patches.detach(), Var::as_detached_tensor)
    }

    fn run(&self, patches: &Tensor, parameter: impl Fn(&Var) -> Tensor) -> Result<Tensor, Error> {
        // Features of a half precision backbone meet a head in f32.
        let mut x = match self.layers.first() {
            Some((weight, _)) => patches.to_dtype(weight.dtype())?,
            None => patches.clone(),
        };
        // One product over all rows: cut by images, each would pack the head's large matrices for few rows.
        let dims = x.dims().to_vec();
        x = x.flatten_to(dims.len().saturating_sub(2))?;
        for (i, (weight, bias)) in self.layers.iter().enumerate() {
            let (weight, bias) = (parameter(weight), parameter(bias));
            x = if i + 1 < self.layers.len() {
                ops::linear_gelu(&x, &weight, &bias)?
            } else {
                ops::linear(&x, &weight, &bias)?
            };
        }
        let unit = ops::l2_normalize(&x)?;
        let (_, outer) = dims.split_last().unwrap_or((&0, &[]));
        Ok(unit.reshape([outer, &[unit.dim(candle_core::D::Minus1)?]].concat())?)
    }

    /// Names and variables.
    pub fn parameters(&self) -> Vec<(String, Var)> {
        let layers = self.layers.iter().enumerate();
        layers
            .flat_map(|(i, (weight, bias))| {
                [
                    (format!("head.{i}.weight"), weight.clone()),
                    (format!("head.{i}.bias"), bias.clone()),
                ]
            })
            .collect()
    }
}
