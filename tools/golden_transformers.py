"""Golden values of defend-transformers: small random CLIP, SigLIP, DINOv2 and EVA-02 models of transformers and timm.

Usage: python tools/golden_transformers.py   (needs torch, timm, transformers, safetensors)
Writes crates/defend-transformers/tests/golden/models.json (configuration and the names and shapes of each model's tensors) and
outputs.safetensors. Weights and images are not stored: both sides make them from the same formula (`noise`).

  <model>.cls.<block>      [2, D] image embedding of the block
  <model>.patches.<block>  [2, 5, D] the first five patch tokens of the block
  vit.logits               [2, 7] of Hugging Face's ViTForImageClassification

  clip      transformers.CLIPVisionModel, blocks 0 and 2 after post_layernorm
  siglip    transformers.SiglipVisionModel, block 1: last_hidden_state, and pooler_output for cls
  dinov2, dinov2_reg4   timm's VisionTransformer at 518 px, block 1 after the norm; eps 1e-5
                        and 1e-6, and GELU by tanh, as candle has them
  eva02     timm's Eva at 448 px, blocks 0 and 1 after the norm; cls: norm of the mean of the patches before the norm
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from golden import write
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

FOLDER = Path(__file__).parent.parent / "crates/defend-transformers/tests/golden"


def noise(count, seed):
    """Values in -1..1 that need no generator: a hash of the index."""
    x = np.arange(count, dtype=np.uint32) + np.uint32(seed * 1_000_003 & 0xFFFFFFFF)
    for shift, factor in [(16, 0x7FEB352D), (15, 0x846CA68B)]:
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    x ^= x >> np.uint32(16)
    return (x >> np.uint32(8)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)


def kind(name, shape):
    """Decides the scale of a tensor's values."""
    if "norm" in name and name.endswith("weight"):
        return "scale"
    if name.endswith("gamma"):
        return "gamma"
    if len(shape) == 1 or any(part in name for part in ("pos", "token", "probe", "class_embedding")):
        return "vector"
    return "matrix"


def weight(kind, shape, seed):
    values = noise(int(np.prod(shape)), seed)
    values = {
        "scale": lambda: 1 + np.float32(0.2) * values,
        "gamma": lambda: np.float32(0.5) + np.float32(0.2) * values,
        "vector": lambda: np.float32(0.3) * values,
        "matrix": lambda: np.float32((3 / np.prod(shape[1:])) ** 0.5) * values,
    }[kind]()
    return torch.from_numpy(values.reshape(shape))


def fill(model, in_file=lambda name: name):
    """Sets every parameter: names as files have them, shapes and kinds in the order of their seeds."""
    state = model.state_dict()
    names = sorted(name for name, t in state.items() if t.dtype == torch.float32)
    listed = [[in_file(name), list(state[name].shape), kind(name, state[name].shape)] for name in names]
    state |= {name: weight(entry[2], entry[1], seed) for seed, (name, entry) in enumerate(zip(names, listed))}
    model.load_state_dict(state)
    return listed


def vision(name):
    return name if name.startswith("vision_model.") else "vision_model." + name


def old_vit(name):
    """The names that transformers gave ViT's tensors when the hub's files were written."""
    for new, old in [
        ("vit.layers.", "vit.encoder.layer."),
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ]:
        name = name.replace(new, old)
    return name


def images(side):
    return torch.from_numpy(noise(2 * 3 * side * side, 99).reshape(2, 3, side, side))


def layers(out, name, found):
    for block, (cls, patches) in found.items():
        out[f"{name}.cls.{block}"] = cls
        out[f"{name}.patches.{block}"] = patches[:, :5]


@torch.no_grad()
def clip(out, models):
    config = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8)
    model = CLIPVisionModel(CLIPVisionConfig(**config, projection_dim=16)).eval()
    models["clip"] = {"config": {"vision_config": config}, "tensors": fill(model, vision)}
    states = model(images(32), output_hidden_states=True).hidden_states
    norm = getattr(model, "vision_model", model).post_layernorm
    layers(out, "clip", {i: (norm(states[i + 1])[:, 0], norm(states[i + 1])[:, 1:]) for i in (0, 2)})


@torch.no_grad()
def siglip(out, models):
    config = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
    model = SiglipVisionModel(SiglipVisionConfig(**config)).eval()
    models["siglip"] = {"config": {"vision_config": config}, "tensors": fill(model, vision)}
    found = model(images(32))
    layers(out, "siglip", {1: (found.pooler_output, found.last_hidden_state)})


@torch.no_grad()
def dino(out, models, name, registers, eps):
    model = VisionTransformer(
        img_size=518, patch_size=14, embed_dim=32, depth=2, num_heads=2, num_classes=0, init_values=1e-5,
        reg_tokens=registers, no_embed_class=registers > 0, norm_layer=partial(torch.nn.LayerNorm, eps=eps),
        act_layer=partial(torch.nn.GELU, approximate="tanh"),
    ).eval()  # fmt: skip
    models[name] = {"tensors": fill(model)}
    tokens = model.forward_features(images(518))
    layers(out, name, {1: (tokens[:, 0], tokens[:, 1 + registers :])})


@torch.no_grad()
def eva(out, models):
    model = Eva(
        img_size=448, patch_size=14, embed_dim=64, depth=2, num_heads=1, num_classes=0, mlp_ratio=4 * 2 / 3,
        qkv_fused=False, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True, ref_feat_shape=(16, 16), use_fc_norm=False,
    ).eval()  # fmt: skip
    models["eva02"] = {"tensors": fill(model)}
    states = model.forward_intermediates(images(448), norm=False, output_fmt="NLC", intermediates_only=True)
    layers(out, "eva02", {i: (model.norm(states[i].mean(1)), model.norm(states[i])) for i in (0, 1)})


@torch.no_grad()
def vit(out, models):
    config = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
    model = ViTForImageClassification(ViTConfig(**config, num_labels=7, layer_norm_eps=1e-12)).eval()
    models["vit"] = {"config": config, "tensors": fill(model, old_vit)}
    out["vit.logits"] = model(images(32)).logits


def main():
    out, models = {}, {}
    clip(out, models)
    siglip(out, models)
    dino(out, models, "dinov2", 0, 1e-5)
    dino(out, models, "dinov2_reg4", 4, 1e-6)
    eva(out, models)
    vit(out, models)
    (FOLDER / "models.json").write_text(json.dumps(models) + "\n")
    write("defend-transformers", "outputs", out)
    print("timm", timm.__version__)


if __name__ == "__main__":
    main()
