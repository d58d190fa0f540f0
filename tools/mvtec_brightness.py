"""Whether brightness alone tells a MVTec AD category's test images apart, and a copy of it without that difference.

  python tools/mvtec_brightness.py mvtec/screw [--equalise screw-equal]

Prints mean grey levels (0..255) and the AUROC of the grey level itself (above 0.5: defects are brighter) and of its distance
to the training images' mean. With --equalise, writes the category again with every image scaled to the training images'
mean of medians, which on a uniform background is its level.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image


def auroc(normal, abnormal):
    normal, abnormal = np.asarray(normal)[:, None], np.asarray(abnormal)[None]
    return float(((abnormal > normal) + 0.5 * (abnormal == normal)).mean())


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), np.float32)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("category", type=Path)
    parser.add_argument("--equalise", type=Path)
    arguments = parser.parse_args()
    folders = [arguments.category / "train" / "good", *sorted((arguments.category / "test").iterdir())]
    levels, medians = {}, []
    for folder in folders:
        images = [pixels(path) for path in sorted(folder.iterdir())]
        levels[folder] = [float(image.mean()) for image in images]
        if folder == folders[0]:
            medians = [float(np.median(image)) for image in images]
        name = folder.relative_to(arguments.category)
        print(f"{name}: {len(images)} images, grey level {np.mean(levels[folder]):.1f}")
    train = np.mean(levels[folders[0]])
    good = levels[arguments.category / "test" / "good"]
    bad = [level for folder in folders[1:] if folder.name != "good" for level in levels[folder]]
    print(f"AUROC of the grey level {auroc(good, bad):.3f}")
    print(f"AUROC of its distance to the training mean {auroc(np.abs(good - train), np.abs(bad - train)):.3f}")
    if arguments.equalise:
        target = float(np.mean(medians))
        shutil.copytree(arguments.category / "ground_truth", arguments.equalise / "ground_truth")
        for folder in folders:
            out = arguments.equalise / folder.relative_to(arguments.category)
            out.mkdir(parents=True)
            for path in sorted(folder.iterdir()):
                image = pixels(path)
                scaled = (image * (target / np.median(image))).clip(0, 255).round().astype(np.uint8)
                Image.fromarray(scaled).save(out / path.name, quality=95)


if __name__ == "__main__":
    main()
