//! The same network as one writes it with candle's own operations: what the kernels of defend-nn have to beat.
//!
//! The forward pass takes candle's fused softmax and LayerNorm, which have no gradient; the training step the ones that
//! have. Products are candle's, by `gemm` with AVX-512 where the processor has it.

use std::collections::HashMap;

use candle_core::{D, Result, Tensor, Var};
use candle_nn::ops::{layer_norm, layer_norm_slow, softmax, softmax_last_dim};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use defend_vit::Architecture;

/// A ViT by timm's names.
pub(crate) struct Vit {
    weights: HashMap<String, Tensor>,
    variables: Vec<Var>,
    architecture: Architecture,
}

impl Vit {
    /// With weights that train, all but the positional embedding, or frozen ones.
    pub(crate) fn new(
        state: HashMap<String, Tensor>,
        architecture: Architecture,
        trains: bool,
    ) -> Result<Self> {
        let (mut weights, mut variables) = (HashMap::new(), Vec::new());
        for (name, tensor) in state {
            let mut tensor = tensor.copy()?;
            if trains && name != "pos_embed" {
                let var = Var::from_tensor(&tensor)?;
                tensor = var.as_tensor().clone();
                variables.push(var);
            }
            weights.insert(name, tensor);
        }
        Ok(Self {
            weights,
            variables,
            architecture,
        })
    }

    /// The step's optimiser, candle's own.
    pub(crate) fn optimiser(&self) -> Result<AdamW> {
        let parameters = ParamsAdamW {
            lr: 1e-6,
            beta2: 0.95,
            weight_decay: 0.05,
            ..ParamsAdamW::default()
        };
        AdamW::new(self.variables.clone(), parameters)
    }

    /// Tokens after the final norm, `[B, 1 + M, D]`, of all patches or of the `kept` ones of each image.
    pub(crate) fn tokens(&self, images: &Tensor, kept: Option<&[u32]>) -> Result<Tensor> {
        let (b, d) = (images.dim(0)?, self.architecture.width);
        let patches = self.patches(images)?;
        let positions = self.get("pos_embed");
        let mut x = self.linear(&patches, "patch_embed.proj")?;
        let patch_positions = positions.narrow(1, 1, x.dim(1)?)?;
        x = x.broadcast_add(&patch_positions)?;
        if let Some(kept) = kept {
            x = x.index_select(&Tensor::new(kept, x.device())?, 1)?;
        }
        let cls = (self.get("cls_token") + positions.narrow(1, 0, 1)?)?;
        let mut x = Tensor::cat(&[&cls.broadcast_as((b, 1, d))?.contiguous()?, &x], 1)?;
        for i in 0..self.architecture.depth {
            let z = self.norm(&x, &format!("blocks.{i}.norm1"))?;
            x = (x + self.attention(&z, &format!("blocks.{i}.attn"))?)?;
            let z = self.norm(&x, &format!("blocks.{i}.norm2"))?;
            let hidden = self
                .linear(&z, &format!("blocks.{i}.mlp.fc1"))?
                .gelu_erf()?;
            x = (x + self.linear(&hidden, &format!("blocks.{i}.mlp.fc2"))?)?;
        }
        self.norm(&x, "norm")
    }

    fn get(&self, name: &str) -> &Tensor {
        &self.weights[name]
    }

    fn trains(&self) -> bool {
        !self.variables.is_empty()
    }

    /// `[B, 3, H, W]` to `[B, N, 3 p p]`.
    fn patches(&self, images: &Tensor) -> Result<Tensor> {
        let p = self.architecture.patch_size;
        let (b, c, h, w) = images.dims4()?;
        let cut = images.reshape(&[b, c, h / p, p, w / p, p][..])?;
        cut.permute(&[0, 2, 4, 1, 3, 5][..])?
            .reshape((b, h / p * (w / p), c * p * p))
    }

    fn linear(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let weight = self.get(&format!("{name}.weight")).flatten_from(1)?;
        let (b, t, d) = x.dims3()?;
        let rows = x.reshape((b * t, d))?.matmul(&weight.t()?)?;
        let rows = rows.broadcast_add(self.get(&format!("{name}.bias")))?;
        rows.reshape((b, t, ()))
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let norm = if self.trains() {
            layer_norm_slow
        } else {
            layer_norm
        };
        let x = x.contiguous()?;
        norm(
            &x,
            self.get(&format!("{name}.weight")),
            self.get(&format!("{name}.bias")),
            1e-6,
        )
    }

    fn attention(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let (b, t, d) = x.dims3()?;
        let heads = self.architecture.heads;
        let qkv = self.linear(x, &format!("{name}.qkv"))?;
        let qkv = qkv
            .reshape((b, t, 3, heads, d / heads))?
            .permute((2, 0, 3, 1, 4))?;
        let part = |i: usize| qkv.get(i)?.contiguous();
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let scores = (q.matmul(&k.t()?)? * ((d / heads) as f64).powf(-0.5))?;
        let p = if self.trains() {
            softmax(&scores, D::Minus1)?
        } else {
            softmax_last_dim(&scores)?
        };
        let mixed = p.matmul(&v)?.transpose(1, 2)?.reshape((b, t, d))?;
        self.linear(&mixed, &format!("{name}.proj"))
    }
}

/// One step of an optimiser.
pub(crate) fn step(optimiser: &mut AdamW, loss: &Tensor) -> Result<()> {
    optimiser.step(&loss.backward()?)
}
