"""Golden values of defend-vit from timm's VisionTransformer with random weights.

Usage: python tools/golden_vit.py   (needs torch, timm, safetensors)
Writes crates/defend-vit/tests/golden/timm_small.safetensors. Computed in float64 from
f32-representable weights and inputs, stored as f32 (indices u32).

The model: img_size 16, patch 4 (a 4x4 grid), embed_dim 32, depth 3, num_heads 4, mlp_ratio 2,
5 classes, CLS token, erf GELU, LayerNorm eps 1e-6. No parameter is 0 or 1. (Patches of 16 pixels and
an MLP ratio of 4 would test nothing more and need 550 kB.)

  weights.<timm name>            all of state_dict: cls_token [1,1,32], pos_embed [1,17,32] (CLS first),
                                 patch_embed.proj.{weight [32,3,4,4], bias [32]},
                                 blocks.<0..2>.{norm1,norm2}.{weight,bias} [32],
                                 blocks.<i>.attn.qkv.{weight [96,32], bias [96]},
                                 blocks.<i>.attn.proj.{weight [32,32], bias [32]},
                                 blocks.<i>.mlp.fc1.{weight [64,32], bias [64]},
                                 blocks.<i>.mlp.fc2.{weight [32,64], bias [32]},
                                 norm.{weight,bias} [32], head.{weight [5,32], bias [5]}
  images [2,3,16,16]             input, already normalised
  patches [2,16,32], cls [2,32]  last tokens after the final norm
  logits [2,5]                   head(cls)
  tokens.<block> [2,17,32]       output of block 0, 1, 2, before the final norm
  cls_attention.<block> [2,4,16] softmax(q_cls . k / sqrt(d)) per head over all 17 tokens, then the
                                 CLS column dropped (rows sum to less than one)
  keep [2,6] u32                 distinct patch indices per image, in no order; patches that are not kept
                                 are dropped after the positional embedding was added, CLS stays
  kept.patches [2,6,32]          in the order of keep, after the final norm
  kept.cls [2,32]
  kept.cls_attention [2,4,6]     last block
  small_images [2,3,12,8]        a 3x2 grid (rows x columns)
  small.pos_embed [1,7,32]       CLS entry as it is, patch entries 4x4 -> 3x2 by F.interpolate(size=(3, 2),
                                 mode="bicubic", align_corners=False, antialias=False)
  small.patches [2,6,32], small.cls [2,32]
  grad_weighting [2,16,32]       r in loss = sum(patches^2 * r), on `images`, all tokens
  loss []                        that loss
  grads.<timm name>              its gradient with respect to every parameter of blocks 1 and 2
  local [2,16,32], small.local   local CLS tokens of blocks 1 and 2 with reach 1, on images and small_images: see local_cls
  pos_14 [1,14,14,8]             a channels-last grid, and its bicubic interpolations (as above):
  pos_6 [1,6,6,8], pos_20 [1,20,20,8]
"""

import torch
import torch.nn.functional as F
from golden import write
from timm.models.vision_transformer import VisionTransformer

PATCH, MLP_RATIO = 4, 2


def build():
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=4 * PATCH,
        patch_size=PATCH,
        embed_dim=32,
        depth=3,
        num_heads=4,
        mlp_ratio=MLP_RATIO,
        num_classes=5,
        class_token=True,
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            # Attention and MLP weights large enough that no softmax is flat.
            std = 0.2 if name == "patch_embed.proj.weight" else 0.3
            p.copy_(offset + std * torch.randn_like(p))
            assert not ((p == 0) | (p == 1)).any(), name
    return model.double()


def resized(grid, size):
    """[1,H,W,C] -> [1,h,w,C]"""
    grid = F.interpolate(grid.permute(0, 3, 1, 2), size=size, mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1)


def embed(model, images, pos_embed):
    x = model.patch_embed.proj(images).flatten(2).transpose(1, 2) + pos_embed[:, 1:]
    cls = (model.cls_token + pos_embed[:, :1]).expand(len(x), -1, -1)
    return torch.cat([cls, x], 1)


def resized_positions(pos_embed, side, size):
    """pos_embed [1,1+side^2,D] with its patch entries resized from side x side to `size`."""
    patches = pos_embed[:, 1:].unflatten(1, (side, side))
    return torch.cat([pos_embed[:, :1], resized(patches, size).flatten(1, 2)], 1)


def kept_tokens(x, keep):
    """CLS token and the patches `keep` [B,M] of x [B,1+N,D]."""
    return torch.cat([x[:, :1], x[:, 1:].gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))], 1)


def run(model, x):
    """Final tokens, each block's tokens and CLS attention."""
    tokens, attention = [], []
    for block in model.blocks:
        a = block.attn
        b, n, _ = x.shape
        q, k, _ = a.qkv(block.norm1(x)).reshape(b, n, 3, a.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q[:, :, :1] @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        attention.append(weights[:, :, 0, 1:])
        x = block(x)
        tokens.append(x)
    return model.norm(x), tokens, attention


def local_cls(model, entering, start, grid, reach):
    """The CLS token that enters block `start`, run through the rest at each patch with attention to itself and to the patches up
    to `reach` rows and columns away; `entering`: the tokens [B,1+N,D] that enter each block."""
    rows, columns = grid
    row, column = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
    near = ((row[:, None] - row).abs() <= reach) & ((column[:, None] - column).abs() <= reach)
    cls = entering[start][:, :1].expand(-1, rows * columns, -1)
    for block, tokens in list(zip(model.blocks, entering))[start:]:
        a = block.attn
        heads = lambda x: x.unflatten(-1, (3, a.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, own_k, own_v = heads(a.qkv(block.norm1(cls)))
        _, k, v = heads(a.qkv(block.norm1(tokens[:, 1:])))
        to_places = (q @ k.transpose(-2, -1)).masked_fill(~near, -torch.inf)
        logits = torch.cat([(q * own_k).sum(-1, keepdim=True), to_places], -1) / q.shape[-1] ** 0.5
        weights = logits.softmax(-1)
        out = weights[..., :1] * own_v + weights[..., 1:] @ v
        cls = cls + a.proj(out.transpose(1, 2).flatten(2))
        cls = cls + block.mlp(block.norm2(cls))
    return model.norm(cls)


def main():
    model = build()
    out = {f"weights.{k}": v for k, v in model.state_dict().items()}
    images = torch.randn(2, 3, 4 * PATCH, 4 * PATCH).double()
    x = embed(model, images, model.pos_embed)
    final, tokens, attention = run(model, x)
    torch.testing.assert_close(final, model.forward_features(images))  # timm's own path
    out |= {"images": images, "patches": final[:, 1:], "cls": final[:, 0], "logits": model(images)}
    out |= {f"tokens.{i}": t for i, t in enumerate(tokens)}
    out |= {f"cls_attention.{i}": a for i, a in enumerate(attention)}

    keep = torch.stack([torch.randperm(16)[:6] for _ in range(2)])
    assert (keep.sort(1).values != keep).any(1).all()
    final_kept, _, attention_kept = run(model, kept_tokens(x, keep))
    out |= {
        "keep": keep,
        "kept.patches": final_kept[:, 1:],
        "kept.cls": final_kept[:, 0],
        "kept.cls_attention": attention_kept[-1],
    }

    small = torch.randn(2, 3, 3 * PATCH, 2 * PATCH).double()
    pos = resized_positions(model.pos_embed, 4, (3, 2))
    final_small, tokens_small, _ = run(model, embed(model, small, pos))
    out["local"] = local_cls(model, [x, *tokens], 1, (4, 4), 1)
    out["small.local"] = local_cls(model, [embed(model, small, pos), *tokens_small], 1, (3, 2), 1)
    out |= {
        "small_images": small,
        "small.pos_embed": pos,
        "small.patches": final_small[:, 1:],
        "small.cls": final_small[:, 0],
    }

    r = torch.randn(2, 16, 32).double()
    loss = (model.forward_features(images)[:, 1:] ** 2 * r).sum()
    loss.backward()
    out |= {"grad_weighting": r, "loss": loss}
    out |= {
        f"grads.{k}": p.grad for k, p in model.named_parameters() if k.startswith(("blocks.1.", "blocks.2."))
    }

    pos_14 = torch.randn(1, 14, 14, 8).double()
    out |= {"pos_14": pos_14, "pos_6": resized(pos_14, (6, 6)), "pos_20": resized(pos_14, (20, 20))}
    write("defend-vit", "timm_small", out)


if __name__ == "__main__":
    main()
