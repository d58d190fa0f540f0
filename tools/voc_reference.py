"""Reference AUROCs on the VOC 2012 animals: the untouched timm ViT-Ti/16 teacher, uni-class protocol.

Usage: python tools/voc_reference.py [--preprocess squash|crop] [--details]
Reads $DEFEND_ASSETS (default /tmp/assets): VOCdevkit/VOC2012 and weights/vit_tiny_patch16_224.
Features are cached in $DEFEND_ASSETS/cache_voc_ti_<preprocess>.npz, so a rerun takes seconds.

Protocol: train = images of ImageSets/Main/train.txt whose annotation has the class (difficult
objects count); test = all of val.txt, normal if and only if it has the class. AUROC, abnormal is
positive, higher score is more novel.

Preprocessing: a plain squash to 224x224 (PIL bicubic, antialiased, no crop) reproduces the figures
known before (5-NN CLS, 5-NN mean patch, mean CLS: all 14 to three decimals); timm's own evaluation
transform (resize to 248, centre crop 224; --preprocess crop) does not: 5-NN on CLS dog 0.902, person
0.694 against 0.886, 0.715. It is not the worse one, though: means over the classes are mostly higher.

Details that matter, all found by trying (--details prints the variants):
- k-NN: cosine distance, k = 5. Mean or sum of the five is one ranking, so AUROC cannot tell.
- mean patch: mean of the RAW tokens after the final norm (unit tokens: horse 0.910, not 0.912).
- mean CLS: mean of UNIT CLS tokens (raw ones: person 0.810, not 0.813).
- constant student: tokens L2-normalised, then the mean per position, NOT normalised again (the point
  that minimises the squared distance): horse 0.8572. This one was picked after the fact, because it
  meets the only known figure, 0.857; it is not the only one to do so (LayerNorm without affine in place
  of L2: horse 0.8570). Normalised again, as a student's output would be: horse 0.8594 ("unit mean").
- Mahalanobis: Ledoit-Wolf covariance. Without shrinkage cow, with as many images as dimensions, drops.
"""

import argparse
import os
import re
from pathlib import Path

import numpy as np

ASSETS = Path(os.environ.get("DEFEND_ASSETS", "/tmp/assets"))
VOC = ASSETS / "VOCdevkit/VOC2012"
CLASSES = ["dog", "cat", "person", "horse", "sheep", "cow"]


def split(name):
    return (VOC / f"ImageSets/Main/{name}.txt").read_text().split()


def contents(image):
    xml = (VOC / f"Annotations/{image}.xml").read_text()
    return {re.search(r"<name>(\w+)</name>", o).group(1) for o in re.findall(r"<object>.*?</object>", xml, re.S)}


def teacher():
    import timm
    from safetensors.torch import load_file

    model = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    weights = load_file(ASSETS / "weights/vit_tiny_patch16_224/model.safetensors")
    model.load_state_dict({k: v.float() for k, v in weights.items()})  # strict
    return model.eval()


def preprocess(kind):
    from torchvision import transforms as T
    from torchvision.transforms import InterpolationMode

    bicubic = InterpolationMode.BICUBIC
    resize = {
        "squash": [T.Resize((224, 224), interpolation=bicubic)],
        "crop": [T.Resize(248, interpolation=bicubic), T.CenterCrop(224)],
    }[kind]
    return T.Compose([*resize, T.ToTensor(), T.Normalize([0.5] * 3, [0.5] * 3)])


def features(kind):
    """Names, CLS tokens [I,192] and patch tokens [I,196,192] after the final norm."""
    path = ASSETS / f"cache_voc_ti_{kind}.npz"
    names = split("train") + split("val")
    if path.exists():
        cached = np.load(path)
        if list(cached["names"]) == names:
            return names, cached["cls"], cached["patches"].astype(np.float32)
    import torch
    from PIL import Image

    model, transform = teacher(), preprocess(kind)
    cls, patches = [], []
    with torch.inference_mode():
        for i in range(0, len(names), 32):
            batch = [transform(Image.open(VOC / f"JPEGImages/{n}.jpg").convert("RGB")) for n in names[i : i + 32]]
            tokens = model.forward_features(torch.stack(batch)).numpy()
            cls.append(tokens[:, 0])
            patches.append(tokens[:, 1:].astype(np.float16))  # f16 holds the cache at 270 MB
            if i % 640 == 0:
                print(f"{kind}: {i}/{len(names)}", flush=True)
    cls, patches = np.concatenate(cls), np.concatenate(patches)
    np.savez(path, names=np.array(names), cls=cls, patches=patches)
    return names, cls, patches.astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def knn(train, test, k=5):
    """Mean of the k smallest cosine distances."""
    similarity = unit(test) @ unit(train).T
    return 1 - np.sort(similarity, axis=1)[:, -k:].mean(1)


def mean_cosine(train, test, normalise_first):
    centre = (unit(train) if normalise_first else train).mean(0)
    return 1 - unit(test) @ unit(centre)


def mahalanobis(train, test, shrink=True):
    from sklearn.covariance import LedoitWolf, empirical_covariance

    train, test = train.astype(np.float64), test.astype(np.float64)
    centre = train.mean(0)
    covariance = LedoitWolf().fit(train).covariance_ if shrink else empirical_covariance(train)
    delta = test - centre
    return np.einsum("ij,ij->i", delta @ np.linalg.pinv(covariance), delta)


def constant_student(train, test, first=True, last=False):
    """mean_n || unit(t_n) - c_n ||^2, c_n the mean of the training tokens at position n.

    `first`: tokens are L2-normalised before the mean; `last`: c_n is L2-normalised.
    """
    centre = (unit(train) if first else train).mean(0)
    centre = unit(centre) if last else centre
    cosine = np.einsum("ind,nd->in", unit(test), centre)
    return (1 - 2 * cosine + (centre**2).sum(-1)).mean(1)


def scores(cls, patches, train, test):
    raw, normed = patches.mean(1), unit(patches).mean(1)
    return {
        "5-NN CLS": lambda: knn(cls[train], cls[test]),
        "5-NN mean patch": lambda: knn(raw[train], raw[test]),
        "cosine to mean CLS": lambda: mean_cosine(cls[train], cls[test], True),
        "Mahalanobis CLS": lambda: mahalanobis(cls[train], cls[test]),
        "constant student": lambda: constant_student(patches[train], patches[test]),
        "constant student, unit mean": lambda: constant_student(patches[train], patches[test], last=True),
    }, {
        "5-NN mean of unit patches": lambda: knn(normed[train], normed[test]),
        "mean CLS, not normalised first": lambda: mean_cosine(cls[train], cls[test], False),
        "Mahalanobis CLS, no shrinkage": lambda: mahalanobis(cls[train], cls[test], False),
        "Mahalanobis unit CLS": lambda: mahalanobis(unit(cls[train]), unit(cls[test])),
        "constant student, unit mean of raw tokens": lambda: constant_student(
            patches[train], patches[test], first=False, last=True
        ),
        "constant student, position-free mean": lambda: constant_student(
            patches[train].reshape(-1, 1, patches.shape[-1]), patches[test], last=True
        ),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--preprocess", choices=["squash", "crop"], default="squash")
    parser.add_argument("--details", action="store_true", help="also the variants that were tried")
    args = parser.parse_args()

    from sklearn.metrics import roc_auc_score

    names, cls, patches = features(args.preprocess)
    has = [contents(n) for n in names]
    n_train = len(split("train"))
    is_test = np.arange(len(names)) >= n_train
    columns, counts = [], []
    for c in CLASSES:
        normal = np.array([c in h for h in has])
        train, test = np.flatnonzero(normal & ~is_test), np.flatnonzero(is_test)
        main_scores, variants = scores(cls, patches, train, test)
        wanted = main_scores | (variants if args.details else {})
        columns.append({k: roc_auc_score(~normal[test], f()) for k, f in wanted.items()})
        counts.append((len(train), int(normal[test].sum())))
    print(f"\nPreprocessing: {args.preprocess}; {n_train} train, {len(names) - n_train} test images\n")
    print("| score | " + " | ".join(CLASSES) + " | mean |")
    print("|---" * (len(CLASSES) + 2) + "|")
    print("| train / normal test images | " + " | ".join(f"{a} / {b}" for a, b in counts) + " | |")
    for k in columns[0]:
        row = [col[k] for col in columns]
        print(f"| {k} | " + " | ".join(f"{v:.4f}" for v in row) + f" | {np.mean(row):.4f} |")


if __name__ == "__main__":
    main()
