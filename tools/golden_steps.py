"""Golden values of whole optimiser steps: three of the dense stage, three of the distillation.

Usage: python tools/golden_steps.py   (needs torch, timm, safetensors)
Writes crates/defend-dense/tests/golden/steps.safetensors and
crates/defend-distill/tests/golden/steps.safetensors. Computed in float64 from f32-representable weights and
inputs, stored as f32. All images form one batch, so their order does not matter, and nothing is random: the
crop is the whole view, the mask takes the patches of the highest attention.

The backbones are timm's VisionTransformer: img_size 16, patch 4 (a 4x4 grid), embed_dim 16, depth 3,
num_heads 2, mlp_ratio 2, no classes, LayerNorm eps 1e-6.

Both files:
  images [4,3,16,16]
  losses [3]                    before each step
Dense (eq. 1; K 3, tau 0.1, Sinkhorn eps 0.05 and 3 iterations, hard targets; AdamW betas (0.9, 0.999), backbone
1e-3, head and prototypes 1e-2, decay 0.05 everywhere):
  weights.<timm name>           of the backbone; blocks 1 and 2 train
  head.<0..1>.{weight, bias}    16-12-8; prototypes [3,8], not normalised: each step begins with that
  after.<timm name>             blocks 1 and 2 after the three steps
  after.head.<i>.<p>, after.prototypes [3,8]   (normalised once more at the end)
  The crop is the view, resized to 8x8 pixels (antialiased bilinear): a 2x2 grid, positions resized bicubically.
  Its target is the mean of the one-hot assignments of the 2x2 cells under each of its patches.
Distillation (eqs. 3 and 4, plus the CLS token's distance; 50 % of the patches kept, those of the highest CLS
attention of the teacher, mean over heads; AdamW betas (0.9, 0.95), peak 1e-2, decay 0.05 on matrices only; one step
of warm-up, then cosine to 0.01 of the peak):
  teacher.<timm name>, student.<timm name>     all parameters, the student's all train
  after.<timm name>             the student's after the three steps
"""

import math

import torch
import torch.nn.functional as F
from golden import sinkhorn, unit, write
from golden_vit import embed, kept_tokens, resized_positions, run
from timm.models.vision_transformer import VisionTransformer
from torch import nn

PATCH, STEPS = 4, 3


def vit():
    model = VisionTransformer(
        img_size=16, patch_size=PATCH, embed_dim=16, depth=3, num_heads=2, mlp_ratio=2, num_classes=0
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.copy_(offset + 0.3 * torch.randn_like(p))
    return model.double()


def parameters(module, prefix):
    return {f"{prefix}{name}": p.detach().clone() for name, p in module.named_parameters()}


def dense():
    model = vit()
    head = nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 8))
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    head = head.double()
    prototypes = nn.Parameter(torch.randn(3, 8).double())
    images = torch.randn(4, 3, 16, 16).double()
    layers = {0: head[0], 1: head[2]}
    out = {"images": images, "prototypes": prototypes.detach().clone()} | parameters(model, "weights.")
    for i, layer in layers.items():
        out |= parameters(layer, f"head.{i}.")

    trained = [p for block in model.blocks[1:] for p in block.parameters()]
    groups = [
        {"params": trained, "lr": 1e-3},
        {"params": [*head.parameters(), prototypes], "lr": 1e-2},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    crops = F.interpolate(images, size=(8, 8), mode="bilinear", antialias=True, align_corners=False)
    losses = []
    for _ in range(STEPS):
        with torch.no_grad():
            prototypes.copy_(unit(prototypes))
            view = run(model, embed(model, images, model.pos_embed))[0][:, 1:]
            q = sinkhorn(unit(head(view)).flatten(0, 1) @ prototypes.t())
            top = q.topk(2).values
            assert (top[:, 0] - top[:, 1]).min() > 1e-3, "an argmax nearly tied: take another seed"
            labels = F.one_hot(q.argmax(-1), 3).double().reshape(4, 4, 4, 3)
            target = F.avg_pool2d(labels.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).flatten(1, 2)
        positions = resized_positions(model.pos_embed, 4, (2, 2))
        tokens = run(model, embed(model, crops, positions))[0][:, 1:]
        scores = unit(head(tokens)) @ prototypes.t() / 0.1
        loss = -(target * scores.log_softmax(-1)).sum(-1).mean()
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    out["losses"] = torch.stack(losses)
    out |= {k: v for k, v in parameters(model, "after.").items() if "blocks.1" in k or "blocks.2" in k}
    for i, layer in layers.items():
        out |= parameters(layer, f"after.head.{i}.")
    out["after.prototypes"] = unit(prototypes)
    print("dense losses", out["losses"].tolist())
    write("defend-dense", "steps", out)


def distill():
    teacher, student = vit(), vit()
    images = torch.randn(4, 3, 16, 16).double()
    out = {"images": images} | parameters(teacher, "teacher.") | parameters(student, "student.")
    with torch.no_grad():
        target, _, attention = run(teacher, embed(teacher, images, teacher.pos_embed))
    attention = attention[-1].mean(1)
    order = attention.sort(1, descending=True)
    assert (order.values[:, 7] - order.values[:, 8]).min() > 1e-4, "the mask is nearly tied: take another seed"
    keep = order.indices[:, :8].sort(1).values

    matrices = [p for n, p in student.named_parameters() if p.dim() > 1 and "token" not in n and n != "pos_embed"]
    rest = [p for p in student.parameters() if not any(p is m for m in matrices)]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    target = kept_tokens(target, keep)
    losses = []
    for step in range(STEPS):
        rate = 1e-2
        if step > 0:
            progress = (step - 1) / (STEPS - 1)
            rate *= 0.01 + 0.5 * 0.99 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens = embed(student, images, student.pos_embed)
        found = run(student, kept_tokens(tokens, keep))[0]
        distance = ((unit(found) - unit(target)) ** 2).sum(-1)
        loss = distance[:, 1:].mean() + distance[:, 0].mean()
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    out["losses"] = torch.stack(losses)
    out |= parameters(student, "after.")
    print("distillation losses", out["losses"].tolist())
    write("defend-distill", "steps", out)


if __name__ == "__main__":
    torch.manual_seed(3)
    dense()
    distill()
