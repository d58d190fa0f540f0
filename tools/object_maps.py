"""What says of a patch which object it shows? AUROC of patches in boxes of the normal class against patches in boxes of other classes.

    python tools/object_maps.py ASSETS        # pip install torch timm scikit-learn pillow safetensors; five minutes on two cores

VOC, each of six animals normal in turn: a thousand places of 32 training photos, a thousand of 500 ordinary photos, 400 test photos; log density
ratio of the two, Gaussian kernels. Pooled over all patches, and within an image (mean over images that show both). The rule of docs/METHOD.md is
"last third, 5 x 5, with its own token".
"""

import random
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from golden_vit import local_cls
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

CLASSES = ("dog", "cat", "person", "horse", "sheep", "cow")
SIDE, WIDTH, PLACES = 14, 6.0, 1000
unit = lambda x: F.normalize(x.float(), dim=-1)


def image(path):
    pixels = np.asarray(Image.open(path).convert("RGB").resize((224, 224), Image.BICUBIC)).copy()
    return (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - 0.5) / 0.5


VARIANTS = {
    "patch tokens of the last block": lambda m, x, out: out[-1],
    "patch tokens of the last but one block": lambda m, x, out: out[-2],
    "local CLS, last seven blocks, 3 x 3": lambda m, x, out: local_cls(m, x, 5, (SIDE, SIDE), 1),
    "local CLS, last third, 3 x 3": lambda m, x, out: local_cls(m, x, 8, (SIDE, SIDE), 1),
    "local CLS, last half, 5 x 5": lambda m, x, out: local_cls(m, x, 6, (SIDE, SIDE), 2),
    "local CLS, last third, 5 x 5": lambda m, x, out: local_cls(m, x, 8, (SIDE, SIDE), 2),
    "local CLS, last third, 7 x 7": lambda m, x, out: local_cls(m, x, 8, (SIDE, SIDE), 3),
}


def annotated(voc, name):
    root = ET.parse(voc / "Annotations" / f"{name}.xml").getroot()
    size = [float(root.find(f"size/{s}").text) for s in ("width", "height")]
    box = lambda o: [float(o.find(f"bndbox/{k}").text) / size[i % 2] for i, k in enumerate(("xmin", "ymin", "xmax", "ymax"))]
    return [(o.find("name").text, box(o)) for o in root.findall("object")]


def inside(box):
    at = (torch.arange(SIDE) + 0.5) / SIDE
    return (((at >= box[1]) & (at <= box[3]))[:, None] & ((at >= box[0]) & (at <= box[2]))[None]).flatten()


def log_density(x, known):
    return torch.cat([torch.logsumexp(-WIDTH * (2 - 2 * rows @ known.T), -1) for rows in x.split(8)]) - np.log(len(known))


def judge(novelty, boxes):
    """Pooled and within-image AUROC of one class: novelty [images, places], boxes (normal, other) of each image."""
    scores, truth, within = [], [], []
    for s, (normal, other) in zip(novelty, boxes):
        some = normal ^ other
        scores.append(s[some])
        truth.append(other[some])
        if normal[some].any() and other[some].any():
            within.append(roc_auc_score(other[some], s[some]))
    return roc_auc_score(torch.cat(truth), torch.cat(scores)), np.mean(within)


@torch.inference_mode()
def main():
    assets = Path(sys.argv[1])
    voc, model = assets / "VOCdevkit/VOC2012", timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    state = load_file(assets / "weights/vit_tiny_patch16_224/model.safetensors")
    model.load_state_dict({k: v.float() for k, v in state.items()})
    entering, left = [None] * 12, [None] * 12
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda m, a, i=i: entering.__setitem__(i, a[0]))
        block.register_forward_hook(lambda m, a, out, i=i: left.__setitem__(i, out))
    rng = random.Random(0)
    split = {s: (voc / f"ImageSets/Main/{s}.txt").read_text().split() for s in ("train", "val")}
    photo = lambda name: voc / "JPEGImages" / f"{name}.jpg"
    shown = {n: {c for c, _ in annotated(voc, n)} for n in split["train"]}
    groups = {c: [photo(n) for n in rng.sample([n for n in split["train"] if c in shown[n]], 32)] for c in CLASSES}
    tested = rng.sample(split["val"], 400)
    groups["test"] = [photo(n) for n in tested]
    groups["ordinary"] = rng.sample(sorted((assets / "imagenet-sample").iterdir()), 500)
    tokens = {v: {} for v in VARIANTS}
    for group, paths in groups.items():
        parts = {v: [] for v in VARIANTS}
        for i in range(0, len(paths), 16):
            model.forward_features(torch.stack([image(p) for p in paths[i : i + 16]]))
            out = [model.norm(x)[:, 1:] for x in left[10:]]
            for name, of in VARIANTS.items():
                parts[name].append(unit(of(model, entering, out)).half())
        for name, batches in parts.items():
            tokens[name][group] = torch.cat(batches).float()
    own = tokens["patch tokens of the last but one block"]
    best = tokens["local CLS, last third, 5 x 5"]
    tokens["**local CLS, last third, 5 x 5, with its own token**"] = {g: unit(torch.cat([best[g], 0.7 * own[g]], -1)) for g in best}
    boxes = {c: [] for c in CLASSES}
    for name in tested:
        found = annotated(voc, name)
        for c in CLASSES:
            masks = [[inside(b) for n, b in found if (n == c) == normal] for normal in (True, False)]
            boxes[c].append([torch.stack(m).any(0) if m else torch.zeros(SIDE**2, dtype=torch.bool) for m in masks])
    sample = lambda x, gen: x.flatten(0, 1)[torch.randperm(x.shape[0] * x.shape[1], generator=gen)[:PLACES]]
    print("| what stands for a patch | pooled | within an image | without a background |\n|---|---|---|---|")
    for name, of in tokens.items():
        gen = torch.Generator().manual_seed(0)
        ordinary = log_density(of["test"], sample(of["ordinary"], gen))
        normal = {c: log_density(of["test"], sample(of[c], gen)) for c in CLASSES}
        both = np.mean([judge(ordinary - normal[c], boxes[c]) for c in CLASSES], 0)
        alone = np.mean([judge(-normal[c], boxes[c]) for c in CLASSES], 0)
        print(f"| {name} | {both[0]:.3f} | {both[1]:.3f} | {alone[0]:.3f}, {alone[1]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
