//! A whole pre-norm transformer block on a CUDA device: forward, and the backward pass written by hand.

use candle_core::{Result, Tensor};

use super::rows::{self, Branch, Heads};

/// A block's parameters, in the order of `BlockParameters`, and what is constant in a call.
#[derive(Clone, Copy)]
pub struct Block<'a> {
    /// Scale and shift of the first LayerNorm, `[D]`.
    pub norm1: [&'a Tensor; 2],
    /// Queries, keys and values, `[3 D, D]` and `[3 D]`.
    pub qkv: [&'a Tensor; 2],
    /// Projection of the attention's output, `[D, D]` and `[D]`.
    pub projection: [&'a Tensor; 2],
    /// Scale and shift of the second LayerNorm, `[D]`.
    pub norm2: [&'a Tensor; 2],
    /// Into the MLP's hidden channels, `[H, D]` and `[H]`.
    pub fc1: [&'a Tensor; 2],
    /// Out of them, `[D, H]` and `[D]`.
    pub fc2: [&'a Tensor; 2],
    /// LayerScale of both branches; has no backward pass here.
    pub scales: Option<[&'a Tensor; 2]>,
    /// Attention heads; divides D.
    pub heads: usize,
    /// Added to the variance in both LayerNorms.
    pub eps: f64,
    /// Factors of both branches for each image, `[B]` in `f32`.
    pub factors: Option<&'a [Tensor; 2]>,
}

/// What the backward pass needs, `[B T, ...]`.
pub struct Saved {
    x: Tensor,
    kept1: Tensor,
    z1: Tensor,
    attention: Attention,
    attended: Tensor,
    middle: Tensor,
    kept2: Tensor,
    z2: Tensor,
    hidden: Tensor,
    activated: Tensor,
}

/// Attention whose probabilities are in memory: for a backward pass, and for what [`Heads::attend`] does not take.
struct Attention {
    /// `[B h, T, d]`, times the scale.
    q: Tensor,
    /// `[B h, padded, d]`, as `v`.
    k: Tensor,
    v: Tensor,
    /// `[B h, T, padded]`.
    probabilities: Tensor,
}

impl Attention {
    /// Of `[B T, 3 D]` before its bias.
    fn new(heads: Heads, packed: Tensor, bias: &Tensor, scale: f64) -> Result<Self> {
        let [q, k, v] = heads.split(&packed, bias, scale)?;
        drop(packed);
        let probabilities = q.matmul(&k.t()?)?;
        heads.softmax(&probabilities)?;
        Ok(Self {
            q,
            k,
            v,
            probabilities,
        })
    }

    /// Of the first token to the others, `[B, h, T - 1]`.
    fn first_rows(&self, heads: Heads) -> Result<Tensor> {
        let others = heads.tokens - 1;
        let rows = self.probabilities.narrow(1, 0, 1)?.narrow(2, 1, others)?;
        rows.force_contiguous()?
            .reshape((heads.images, heads.count, others))
    }
}

/// What a forward pass finds.
pub struct Passed {
    /// `[B, T, D]`.
    pub out: Tensor,
    /// `[B, h, T - 1]`, where it was asked for.
    pub cls_attention: Option<Tensor>,
    /// What the backward pass needs, where one was asked for.
    pub saved: Option<Saved>,
}

/// `x W^T` for rows `[R, I]`.
fn map(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)
}

impl Block<'_> {
    fn heads(&self, x: &Tensor) -> Result<Heads> {
        let (images, tokens, width) = x.dims3()?;
        Ok(Heads {
            images,
            tokens,
            padded: tokens.next_multiple_of(crate::ALIGNMENT),
            count: self.heads,
            depth: width / self.heads,
        })
    }

    fn branch<'a>(&'a self, which: usize, y: &'a Tensor, bias: &'a Tensor) -> Branch<'a> {
        Branch {
            y,
            bias,
            factors: self.factors.map(|factors| &factors[which]),
            scale: self.scales.map(|scales| scales[which]),
        }
    }

    /// `x`: `[B, T, D]`, contiguous and without a graph.
    ///
    /// # Errors
    /// Those of candle and of the CUDA driver.
    pub fn forward(&self, x: &Tensor, with_cls: bool, save: bool) -> Result<Passed> {
        let (shape, heads) = (x.shape(), self.heads(x)?);
        let x = x.reshape((heads.images * heads.tokens, ()))?;
        let (z1, kept1) = rows::layer_norm(&x, self.norm1, self.eps, save)?;
        let packed = map(&z1, self.qkv[0])?;
        let scale = 1.0 / (heads.depth as f64).sqrt();
        let (attended, cls_attention, attention) = if !save && heads.fuse(&packed) {
            let cls = with_cls.then(|| heads.cls_attention(&packed, self.qkv[1], scale));
            let attended = heads.attend(&packed, self.qkv[1], scale)?;
            (attended, cls.transpose()?, None)
        } else {
            let attention = Attention::new(heads, packed, self.qkv[1], scale)?;
            let cls = with_cls.then(|| attention.first_rows(heads));
            let attended = heads.merge(&attention.probabilities.matmul(&attention.v)?)?;
            (attended, cls.transpose()?, Some(attention))
        };
        let y = map(&attended, self.projection[0])?;
        let branch = self.branch(0, &y, self.projection[1]);
        let (middle, z2, kept2) = rows::residual_norm(&x, &branch, self.norm2, self.eps, save)?;
        drop(y);
        let hidden = map(&z2, self.fc1[0])?;
        let activated = rows::bias_gelu(&hidden, self.fc1[1])?;
        let y = map(&activated, self.fc2[0])?;
        let out = rows::residual(&middle, &self.branch(1, &y, self.fc2[1]))?;
        let saved = match (kept1, kept2, attention) {
            (Some(kept1), Some(kept2), Some(attention)) => Some(Saved {
                x,
                kept1,
                z1,
                attention,
                attended,
                middle,
                kept2,
                z2,
                hidden,
                activated,
            }),
            _ => None,
        };
        Ok(Passed {
            out: out.reshape(shape)?,
            cls_attention,
            saved,
        })
    }

    /// Gradients with respect to the input `[B, T, D]`, and to the parameters where `with_parameters`, from that of the
    /// output, `g`.
    ///
    /// # Errors
    /// Those of candle and of the CUDA driver.
    pub fn backward(
        &self,
        saved: &Saved,
        g: &Tensor,
        with_parameters: bool,
    ) -> Result<(Tensor, Option<Vec<Tensor>>)> {
        let (shape, heads) = (g.shape(), self.heads(g)?);
        let g = crate::aligned(g)?.reshape((heads.images * heads.tokens, ()))?;
        let scaled = |g: &Tensor, which: usize| match self.factors {
            Some(factors) => rows::scale_rows(g, &factors[which]),
            None => Ok(g.clone()),
        };
        // MLP.
        let g2 = scaled(&g, 1)?;
        let dactivated = g2.matmul(self.fc2[0])?;
        let dhidden = rows::bias_gelu_backward(&saved.hidden, self.fc1[1], &dactivated)?;
        drop(dactivated);
        let dz2 = dhidden.matmul(self.fc1[0])?;
        let (w, kept) = (self.norm2[0], &saved.kept2);
        let dmiddle = rows::layer_norm_backward(&saved.middle, kept, w, &dz2, Some(&g))?;
        // Attention.
        let g1 = scaled(&dmiddle, 0)?;
        let dattended = heads.unmerge(&g1.matmul(self.projection[0])?)?;
        let Attention {
            q,
            k,
            v,
            probabilities,
        } = &saved.attention;
        let dv = probabilities.t()?.matmul(&dattended)?;
        let dlogits = dattended.matmul(&v.t()?)?;
        heads.softmax_backward(probabilities, &dlogits)?;
        let dq = dlogits.matmul(k)?;
        let dk = dlogits.t()?.matmul(q)?;
        let scale = 1.0 / (heads.depth as f64).sqrt();
        let dqkv = heads.join([&dq, &dk, &dv], scale)?;
        let dz1 = dqkv.matmul(self.qkv[0])?;
        let (w, kept) = (self.norm1[0], &saved.kept1);
        let dx = rows::layer_norm_backward(&saved.x, kept, w, &dz1, Some(&dmiddle))?;
        let dx = dx.reshape(shape)?;
        if !with_parameters {
            return Ok((dx, None));
        }
        let mut gradients = Vec::with_capacity(12);
        gradients.extend(rows::norm_sums(&dz1, &saved.x, &saved.kept1)?);
        for (g, x) in [(&dqkv, &saved.z1), (&g1, &saved.attended)] {
            gradients.extend([g.t()?.matmul(x)?, rows::column_sums(g)?]);
        }
        gradients.extend(rows::norm_sums(&dz2, &saved.middle, &saved.kept2)?);
        for (g, x) in [(&dhidden, &saved.z2), (&g2, &saved.activated)] {
            gradients.extend([g.t()?.matmul(x)?, rows::column_sums(g)?]);
        }
        Ok((dx, Some(gradients)))
    }
}

/// Whether the kernels take a block's input: heads of whole packs, and a token beside the first.
///
/// # Errors
/// Those of candle and of the CUDA driver.
pub fn takes_heads(x: &Tensor, heads: usize) -> Result<bool> {
    let (_, tokens, width) = x.dims3()?;
    let whole = heads > 0 && width % heads == 0 && (width / heads).is_multiple_of(crate::ALIGNMENT);
    Ok(whole && tokens > 1)
}
