"""Golden values of defend-data: Pillow and torchvision for decoding, resizing and cropping.

Usage: DEFEND_ASSETS=... python tools/golden_preprocess.py   (needs numpy, pillow, torch, torchvision)
Writes crates/defend-data/tests/golden/{formats,parity}.json. `formats` holds synthetic files as hex;
`parity` holds, for the photos of $DEFEND_ASSETS/parity, only means and sampled values.
"""

import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

OUT = Path(__file__).parent.parent / "crates/defend-data/tests/golden"
SIZE, CROP_PCT = 224, 0.9
FILTERS = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


def squash(filter, size=SIZE):
    return Resize((size, size), FILTERS[filter])


def crop(filter, size=SIZE):
    """timm's evaluation transform."""
    return Compose([Resize(int(size / CROP_PCT), FILTERS[filter]), CenterCrop(size)])


def rgb(data):
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def formats():
    """Files that the Rust side has no encoder for, with the pixels Pillow reads."""
    ramp = np.stack([np.full((8, 16), v) for v in (200, 40, 90, 30)], -1).astype(np.uint8)
    ramp[:, 8:] = (10, 120, 60, 100)
    stream = io.BytesIO()
    Image.fromarray(ramp, "CMYK").save(stream, "JPEG", quality=95)
    cmyk = stream.getvalue()
    # Adobe's colour transform, the last byte of its segment: 0 is CMYK, 2 is YCCK.
    at = cmyk.index(b"Adobe") + 11
    assert cmyk[at] == 0
    ycck = cmyk[:at] + b"\x02" + cmyk[at + 1 :]
    # Upright 8 x 16 px, left half dark, stored lying down.
    stream = io.BytesIO()
    lying = np.zeros((8, 16, 3), np.uint8)
    lying[:4] = 250
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(lying).save(stream, "JPEG", quality=95, exif=exif)
    files = {"cmyk": cmyk, "ycck": ycck, "rotated": stream.getvalue()}
    return {
        name: {
            "hex": data.hex(),
            "size": rgb(data).size,
            "pixels": np.asarray(rgb(data)).ravel().tolist(),
        }
        for name, data in files.items()
    }


def synthetic():
    """An image with a formula, resized: no decoder in between."""
    y, x, c = np.meshgrid(np.arange(23), np.arange(41), np.arange(3), indexing="ij")
    image = Image.fromarray(((x * x * 7 + y * 13 * (c + 1) + x * y) % 256).astype(np.uint8))
    return [
        {"filter": f, "fit": name, "size": size, "pixels": np.asarray(t(f, size)(image)).ravel().tolist()}
        for f in FILTERS
        for name, t in [("squash", squash), ("center-crop", crop)]
        for size in (8, 32)
    ]


def sampled(image, places):
    image = np.asarray(image)
    return {
        "mean": image.mean((0, 1)).tolist(),
        "values": [int(image[y, x, c]) for y, x, c in places],
    }


def parity():
    places = np.random.default_rng(0).integers(0, (SIZE, SIZE, 3), (64, 3)).tolist()
    photos = {}
    for path in sorted(Path(os.environ["DEFEND_ASSETS"], "parity").iterdir()):
        image = rgb(path.read_bytes())
        photos[path.name] = {
            "size": image.size,
            "squash": sampled(squash("bicubic")(image), places),
            "center-crop": sampled(crop("bicubic")(image), places),
        }
    return {"places": places, "photos": photos}


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    golden = {"files": formats(), "resized": synthetic()}
    (OUT / "formats.json").write_text(json.dumps(golden) + "\n")
    (OUT / "parity.json").write_text(json.dumps(parity()) + "\n")


if __name__ == "__main__":
    main()
