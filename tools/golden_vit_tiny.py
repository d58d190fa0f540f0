"""Golden values of the real ViT-Ti (timm) on made-up images and on the 24 parity photos.

Usage: DEFEND_ASSETS=... python tools/golden_vit_tiny.py   (needs torch, timm, pillow, safetensors)
Writes crates/defend-core/tests/golden/vit_tiny.safetensors: features only, no weights and no pixels. Made-up images are
waves(batch, side), computed in float64, rounded to f32; the network runs in float64 on them and in f32 on photos.

  full.<part>, small.<part>    2 images of 224 and of 96 pixels (positional embedding 14x14 -> 6x6 bicubically)
      .cls [2,192], .logits [2,1000] (full only), .patches [2,n,192]: every seventh patch token
  attention.<block> [2,3,196]  CLS attention of each block on `full`, CLS column dropped
  kept.indices [2,98] u32      patches that stay, ascending; kept.{cls [2,192], patches [2,14,192] (every seventh)}
  photos.cls [24,192]          the parity photos by name: shorter side resized to 248 (bicubic), centre crop 224
  photos.squashed_cls [24,192] the same, squashed to 224 x 224
  photos.top [24] u32          most likely class of the cropped photo
  sample.accuracy [1]          share of imagenet-sample that is classified rightly, cropped likewise
"""

import json
import os
from pathlib import Path

import numpy as np
import timm
import torch
from golden import write
from golden_vit import embed, kept_tokens, resized_positions, run
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.functional import center_crop, resize

ASSETS = Path(os.environ["DEFEND_ASSETS"])
WEIGHTS = ASSETS / "weights/vit_tiny_patch16_224"


def waves(batch, side):
    b, c, y, x = torch.meshgrid(*(torch.arange(n).double() for n in (batch, 3, side, side)), indexing="ij")
    return (torch.sin(0.11 * y + 0.7 * c * b) * torch.cos(0.07 * x * (1 + b) - 0.5 * c) + 0.3 * torch.sin(0.9 * x)).float()


def photos(folder, transform):
    for path in sorted((ASSETS / folder).iterdir()):
        with Image.open(path) as image:
            pixels = np.asarray(transform(image.convert("RGB")), dtype=np.float32)
        yield torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


@torch.no_grad()
def main():
    config = json.loads((WEIGHTS / "config.json").read_text())
    model = timm.create_model(config["architecture"], num_classes=config["num_classes"]).eval()
    model.load_state_dict(load_file(WEIGHTS / "model.safetensors"), strict=True)

    crop = lambda image: center_crop(resize(image, 248, interpolation=Image.Resampling.BICUBIC), 224)
    squash = lambda image: image.resize((224, 224), Image.Resampling.BICUBIC)
    cropped = torch.stack(list(photos("parity", crop)))
    tokens = model.forward_features(cropped)
    out = {"photos.cls": tokens[:, 0], "photos.top": model.forward_head(tokens).argmax(1)}
    out["photos.squashed_cls"] = model.forward_features(torch.stack(list(photos("parity", squash))))[:, 0]
    # One photo a class; names start with WordNet ids, by which classes are numbered.
    sample = torch.stack(list(photos("imagenet-sample", crop))).split(50)
    top = torch.cat([model(batch).argmax(1) for batch in sample])
    out["sample.accuracy"] = (top == torch.arange(len(top))).float().mean().unsqueeze(0)

    model = model.double()
    full = waves(2, 224).double()
    entering = embed(model, full, model.pos_embed)
    tokens, _, attentions = run(model, entering)
    torch.testing.assert_close(tokens, model.forward_features(full))
    out |= {"full.cls": tokens[:, 0], "full.patches": tokens[:, 1::7], "full.logits": model(full)}
    out |= {f"attention.{i}": a for i, a in enumerate(attentions)}
    positions = resized_positions(model.pos_embed, 14, (6, 6))
    tokens, _, _ = run(model, embed(model, waves(2, 96).double(), positions))
    out |= {"small.cls": tokens[:, 0], "small.patches": tokens[:, 1::7]}
    torch.manual_seed(0)
    keep = torch.stack([torch.randperm(196)[:98].sort().values for _ in range(2)])
    tokens, _, _ = run(model, kept_tokens(entering, keep))
    out |= {"kept.indices": keep, "kept.cls": tokens[:, 0], "kept.patches": tokens[:, 1::7]}
    write("defend-core", "vit_tiny", out)


if __name__ == "__main__":
    main()
