//! How a Vision Transformer is made: from weights, at random, from another one; and its parameters for saving.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, Var};
use defend_nn::ops::{BlockParameters, Prepared};
use defend_nn::{Rng, normal, xavier_uniform};

use crate::block::{Block, Linear, Norm};
use crate::vit::{TrainScope, Vit};
use crate::{BackboneSpec, ComputePrecision, Error, Weights, pos_embed};

/// Gives each parameter of a transformer by timm's name and shape.
type Source<'a> = dyn FnMut(&str, &[usize]) -> Result<Tensor, Error> + 'a;

/// A transformer under construction: parameters become variables where they train.
struct Assembly<'a, 'b> {
    source: &'a mut Source<'b>,
    device: &'a Device,
    eps: f64,
    compute_precision: ComputePrecision,
    variables: Vec<(String, Var)>,
}

/// A tensor in another type; on the CPU, which computes in `f32`, rounded to it.
pub(crate) fn in_dtype(tensor: &Tensor, dtype: DType) -> candle_core::Result<Tensor> {
    let tensor = tensor.to_dtype(dtype)?;
    if tensor.device().is_cpu() {
        return tensor.to_dtype(DType::F32);
    }
    Ok(tensor)
}

impl Assembly<'_, '_> {
    fn parameter(&mut self, name: &str, shape: &[usize], trains: bool) -> Result<Tensor, Error> {
        let mut tensor = (self.source)(name, shape)?.to_device(self.device)?;
        if self.compute_precision == ComputePrecision::Bf16 {
            tensor = in_dtype(&tensor, DType::BF16)?;
        }
        if !trains {
            return Ok(tensor.detach());
        }
        let var = Var::from_tensor(&tensor)?;
        let tensor = var.as_tensor().clone();
        self.variables.push((name.to_owned(), var));
        Ok(tensor)
    }

    fn linear(
        &mut self,
        name: &str,
        outputs: usize,
        inputs: usize,
        trains: bool,
    ) -> Result<Linear, Error> {
        Ok(Linear {
            weight: self.parameter(&format!("{name}.weight"), &[outputs, inputs], trains)?,
            bias: self.parameter(&format!("{name}.bias"), &[outputs], trains)?,
        })
    }

    fn norm(&mut self, name: &str, width: usize, trains: bool) -> Result<Norm, Error> {
        Ok(Norm {
            weight: self.parameter(&format!("{name}.weight"), &[width], trains)?,
            bias: self.parameter(&format!("{name}.bias"), &[width], trains)?,
            eps: self.eps,
        })
    }

    fn block(
        &mut self,
        spec: &BackboneSpec,
        at: &str,
        trains: bool,
    ) -> Result<BlockParameters, Error> {
        let arch = &spec.architecture;
        let (d, hidden) = (arch.width, arch.mlp_width);
        let mut pair = |name: &str, shape: &[usize]| -> Result<[Tensor; 2], Error> {
            let (weight, bias) = (format!("{at}.{name}.weight"), format!("{at}.{name}.bias"));
            Ok([
                self.parameter(&weight, shape, trains)?,
                self.parameter(&bias, &shape[..1], trains)?,
            ])
        };
        Ok(BlockParameters {
            norm1: pair("norm1", &[d])?,
            qkv: pair("attn.qkv", &[3 * d, d])?,
            projection: pair("attn.proj", &[d, d])?,
            norm2: pair("norm2", &[d])?,
            fc1: pair("mlp.fc1", &[hidden, d])?,
            fc2: pair("mlp.fc2", &[d, hidden])?,
            scales: if arch.layer_scale {
                Some([
                    self.parameter(&format!("{at}.ls1.gamma"), &[d], trains)?,
                    self.parameter(&format!("{at}.ls2.gamma"), &[d], trains)?,
                ])
            } else {
                None
            },
            heads: arch.heads,
            eps: arch.layer_norm_eps,
            compute_precision: spec.compute_precision,
            prepared: Prepared::default(),
        })
    }
}

impl Vit {
    /// Builds a backbone from weights with timm's tensor names.
    ///
    /// A classification head in the file is read when the spec has classes. A frozen backbone computes as
    /// [`BackboneSpec::compute_precision`] says, one with anything that trains in `f32`.
    ///
    /// # Errors
    /// [`Error::Config`] for an impossible spec or scope, and the errors of [`Weights::take`] and
    /// [`Weights::finish`].
    pub fn load(
        spec: BackboneSpec,
        mut weights: Weights,
        scope: TrainScope,
        device: &Device,
    ) -> Result<Self, Error> {
        if spec.architecture.classes == 0 {
            // A backbone cut from a classifier: the head is known and not needed.
            let _ = weights.split_off("head.");
            let _ = weights.split_off("head_dist.");
        }
        let vit = Self::build(spec, scope, 0.0, device, &mut |name, shape| {
            weights.take(name, shape)
        })?;
        weights.finish()?;
        Ok(vit)
    }

    /// A randomly initialised student (METHOD.md, section 2): Xavier-uniform linear maps, a fixed
    /// sine-cosine positional embedding, stochastic depth rising from 0 to `drop_path` over the blocks.
    ///
    /// Everything but the positional embedding trains.
    ///
    /// # Errors
    /// [`Error::Config`] for an impossible spec or a `drop_path` outside `0..1`.
    pub fn random(
        spec: BackboneSpec,
        drop_path: f64,
        rng: &mut Rng,
        device: &Device,
    ) -> Result<Self, Error> {
        let (grid, width) = (spec.architecture.grid(), spec.architecture.width);
        let first = spec.architecture.first_patch_position();
        let cpu = Device::Cpu;
        Self::build(
            spec,
            TrainScope::All,
            drop_path,
            device,
            &mut |name, shape| {
                let tensor = match shape {
                    _ if name == "pos_embed" => {
                        let fixed = pos_embed::sin_cos(grid, width, &cpu)?;
                        let cls = Tensor::zeros((first, width), fixed.dtype(), &cpu)?;
                        Tensor::cat(&[cls, fixed], 0)?.unsqueeze(0)?
                    }
                    _ if name.ends_with("_token") => normal(shape, 0.02, rng, &cpu)?,
                    [outputs, rest @ ..] if !rest.is_empty() => {
                        xavier_uniform(*outputs, rest.iter().product(), rng, &cpu)?
                            .reshape(shape)?
                    }
                    // DINOv2's small first scale (1e-5) is for deep networks from scratch; a student starts at one.
                    _ if name.ends_with("gamma")
                        || name.contains("norm") && name.ends_with("weight") =>
                    {
                        Tensor::ones(shape, candle_core::DType::F32, &cpu)?
                    }
                    _ => Tensor::zeros(shape, candle_core::DType::F32, &cpu)?,
                };
                Ok(tensor)
            },
        )
        .map(Self::with_fixed_positions)
    }

    /// The same backbone, whose positional embedding does not train.
    pub fn with_fixed_positions(mut self) -> Self {
        self.variables.retain(|(name, _)| name != "pos_embed");
        self.pos_embed = self.pos_embed.detach();
        self
    }

    pub(crate) fn build(
        mut spec: BackboneSpec,
        scope: TrainScope,
        drop_path: f64,
        device: &Device,
        source: &mut Source<'_>,
    ) -> Result<Self, Error> {
        if scope != TrainScope::Frozen {
            spec.compute_precision = ComputePrecision::F32;
        }
        let arch = spec.architecture.clone();
        spec.validate()?;
        let config = |reason| Error::Config {
            origin: spec.name.clone(),
            reason,
        };
        if !(0.0..1.0).contains(&drop_path) {
            return Err(config(format!(
                "drop_path is {drop_path}, expected a share in 0..1"
            )));
        }
        let first_trained = match scope {
            TrainScope::Frozen => arch.depth,
            TrainScope::All => 0,
            TrainScope::LastBlocks(n) if n <= arch.depth => arch.depth - n,
            TrainScope::LastBlocks(n) => {
                return Err(config(format!(
                    "cannot train the last {n} of {} blocks",
                    arch.depth
                )));
            }
        };
        let all = scope == TrainScope::All;
        let (d, p, n) = (arch.width, arch.patch_size, arch.grid().patches());
        let mut build = Assembly {
            source,
            device,
            eps: arch.layer_norm_eps,
            compute_precision: spec.compute_precision,
            variables: Vec::new(),
        };
        let cls_token = build.parameter("cls_token", &[1, 1, d], all)?;
        let optional = |build: &mut Assembly<'_, '_>, name, tokens| match tokens {
            0 => Ok(None),
            tokens => build.parameter(name, &[1, tokens, d], all).map(Some),
        };
        let dist_token = optional(&mut build, "dist_token", usize::from(arch.distilled))?;
        let reg_token = optional(&mut build, "reg_token", arch.registers)?;
        let positions = arch.first_patch_position() + n;
        let pos_embed = build.parameter("pos_embed", &[1, positions, d], all)?;
        let patch_embed = Linear {
            weight: build.parameter("patch_embed.proj.weight", &[d, 3, p, p], all)?,
            bias: build.parameter("patch_embed.proj.bias", &[d], all)?,
        };
        let blocks = (0..arch.depth)
            .map(|i| {
                let (trains, at) = (i >= first_trained, format!("blocks.{i}"));
                let parameters = build.block(&spec, &at, trains)?;
                Ok(Block {
                    parameters,
                    drop_path: drop_path * i as f64 / (arch.depth.max(2) - 1) as f64,
                })
            })
            .collect::<Result<_, Error>>()?;
        let norm = build.norm("norm", d, all)?;
        let head = match arch.classes {
            0 => None,
            classes => Some(build.linear("head", classes, d, false)?),
        };
        let head_dist = match arch.classes {
            classes if classes > 0 && arch.distilled => {
                Some(build.linear("head_dist", classes, d, false)?)
            }
            _ => None,
        };
        Ok(Self {
            variables: build.variables,
            spec,
            patch_embed,
            cls_token,
            dist_token,
            reg_token,
            pos_embed,
            blocks,
            norm,
            head,
            head_dist,
            first_trained,
        })
    }

    /// All parameters by timm's names, in timm's shapes, for saving.
    ///
    /// # Errors
    /// [`Error::Candle`] when candle fails.
    pub fn state_dict(&self) -> Result<HashMap<String, Tensor>, Error> {
        let mut tensors = HashMap::new();
        let mut add = |name: String, tensor: &Tensor| {
            tensors.insert(name, tensor.detach());
        };
        add("cls_token".into(), &self.cls_token);
        add("pos_embed".into(), &self.pos_embed);
        let extra = [
            ("dist_token", &self.dist_token),
            ("reg_token", &self.reg_token),
        ];
        for (name, tokens) in extra {
            if let Some(tokens) = tokens {
                add(name.into(), tokens);
            }
        }
        add("patch_embed.proj.weight".into(), &self.patch_embed.weight);
        add("patch_embed.proj.bias".into(), &self.patch_embed.bias);
        for (i, block) in self.blocks.iter().enumerate() {
            let p = &block.parameters;
            let pairs = [
                ("norm1", &p.norm1),
                ("attn.qkv", &p.qkv),
                ("attn.proj", &p.projection),
                ("norm2", &p.norm2),
                ("mlp.fc1", &p.fc1),
                ("mlp.fc2", &p.fc2),
            ];
            for (name, [weight, bias]) in pairs {
                add(format!("blocks.{i}.{name}.weight"), weight);
                add(format!("blocks.{i}.{name}.bias"), bias);
            }
            for (gamma, ls) in p.scales.iter().flatten().zip(["ls1", "ls2"]) {
                add(format!("blocks.{i}.{ls}.gamma"), gamma);
            }
        }
        add("norm.weight".into(), &self.norm.weight);
        add("norm.bias".into(), &self.norm.bias);
        for (name, head) in [("head", &self.head), ("head_dist", &self.head_dist)] {
            if let Some(head) = head {
                add(format!("{name}.weight"), &head.weight);
                add(format!("{name}.bias"), &head.bias);
            }
        }
        Ok(tensors)
    }
}
