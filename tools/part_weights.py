"""How much the CLS token of the last but one block should weigh in the posterior (docs/TRIALS.md), in PyTorch and f64:

    python tools/part_weights.py ASSETS

AUROC of the posterior alone on VOC's animals, CIFAR-10 and Fashion-MNIST, 20 and 100 normal images, four random samples; pip install torch timm
scikit-learn pillow safetensors.
"""

import gzip
import random
import re
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

WEIGHTS = (1.0, 1.5, 2.0, 3.0)
ANIMALS = ("dog", "cat", "person", "horse", "sheep", "cow")


def teacher(assets):
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    state = load_file(assets / "weights/vit_tiny_patch16_224/model.safetensors")
    model.load_state_dict({k: v.float() for k, v in state.items()})
    model.outputs = {}
    for i in (10, 11):
        model.blocks[i].register_forward_hook(lambda m, a, out, i=i: model.outputs.__setitem__(i, out))
    return model.eval()


@torch.inference_mode()
def tokens(model, images):
    """Unit CLS token of the last but one block, of the last, unit mean patch of the last; each [n, D]."""
    parts = ([], [], [])
    for i in range(0, len(images), 32):
        pixels = [np.asarray(x.convert("RGB").resize((224, 224), Image.BICUBIC)) for x in map(opened, images[i : i + 32])]
        model.forward_features((torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5)
        before, last = (model.norm(model.outputs[k]) for k in (10, 11))
        for part, rows in zip(parts, (before[:, 0], last[:, 0], last[:, 1:].mean(1))):
            part.append(F.normalize(rows.double(), dim=-1))
    return [torch.cat(part) for part in parts]


def opened(image):
    return Image.open(image) if isinstance(image, Path) else Image.fromarray(image)


def log_variance(x, queries, ridge=0.1):
    distances = lambda a, b: (2 - 2 * a @ b.T).clamp_min(0)
    d = distances(x, x)
    g = 1.5 / float(d.clone().fill_diagonal_(9).amin(1).median())
    inverse = torch.linalg.inv(torch.exp(-g * d) + ridge * torch.eye(len(x), dtype=torch.double))
    k = torch.exp(-g * distances(queries, x))
    return (1 - ((k @ inverse) * k).sum(1)).clamp_min(1e-7).log()


def voc(assets):
    root, images, train, shown = assets / "VOCdevkit/VOC2012", [], [], []
    for split in ("val", "train"):
        for name in (root / f"ImageSets/Main/{split}.txt").read_text().split():
            objects = set(re.findall(r"<object><name>(\w+)</name>", (root / f"Annotations/{name}.xml").read_text()))
            images.append(root / f"JPEGImages/{name}.jpg")
            train.append(split == "train")
            shown.append([animal in objects for animal in ANIMALS])
    shown = torch.tensor(shown)
    some = lambda *names: shown[:, [ANIMALS.index(name) for name in names]].any(1)
    sets = {"VOC, one class": [some(a) for a in ANIMALS], "VOC, several": [some("dog", "cat"), some("horse", "sheep", "cow")]}
    return images, torch.tensor(train), sets


def by_class(name, images, train, kind, halves=()):
    kind = torch.tensor(kind)
    sets = {f"{name}, one class": [kind == c for c in range(10)], f"{name}, all but one": [kind != c for c in range(10)]}
    if halves:
        sets[f"{name}, half"] = [torch.isin(kind, torch.tensor(half)) for half in halves]
    return images, torch.tensor(train), sets


def cifar(assets):
    images, train, kind = [], [], []
    for split, count in (("test", 100), ("train", 150)):
        for c, folder in enumerate(sorted((assets / "cifar10" / split).iterdir())):
            images += random.Random(0).sample(sorted(folder.glob("*.jpg")), count)
            train += [split == "train"] * count
            kind += [c] * count
    halves = ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [0, 2, 4, 6, 8], [1, 3, 5, 7, 9])
    return by_class("CIFAR-10", images, train, kind, halves)


def fashion(assets):
    images, train, kind = [], [], []
    for split, count in (("t10k", 100), ("train", 150)):
        read = lambda what: gzip.open(assets / f"fashion-mnist/{split}-{what}-ubyte.gz").read()
        pixels = np.frombuffer(read("images-idx3"), np.uint8, offset=16).reshape(-1, 28, 28)
        labels = np.frombuffer(read("labels-idx1"), np.uint8, offset=8)
        for c in range(10):
            images += [pixels[i] for i in random.Random(0).sample(list(np.where(labels == c)[0]), count)]
            train += [split == "train"] * count
            kind += [c] * count
    return by_class("Fashion-MNIST", images, train, kind)


if __name__ == "__main__":
    assets = Path(sys.argv[1])
    model = teacher(assets)
    print("| AUROC, normal images |", " | ".join(f"{w:g}" for w in WEIGHTS), "|")
    print("|---|" + "---|" * len(WEIGHTS))
    for data in (voc, cifar, fashion):
        images, train, sets = data(assets)
        parts = tokens(model, images)
        for count in (20, 100):
            for name, masks in sets.items():
                cells = []
                for weight in WEIGHTS:
                    phi = F.normalize(torch.cat([weight * parts[0], *parts[1:]], 1), dim=-1)
                    areas = []
                    for mask in masks:
                        pool = (train & mask).nonzero().flatten()
                        for draw in range(4):
                            order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(draw))
                            scores = log_variance(phi[pool[order[:count]]], phi[~train])
                            areas.append(roc_auc_score((~mask[~train]).numpy(), scores.numpy()))
                    cells.append("%.3f" % np.mean(areas))
                print(f"| {name}, {count} |", " | ".join(cells), "|", flush=True)
