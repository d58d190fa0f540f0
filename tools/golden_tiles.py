"""Golden values for defend-core's tiles: a whole image at the size of a tile, as PyTorch shrinks it.

    python tools/golden_tiles.py        # writes crates/defend-core/tests/golden/tiles.safetensors
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 14, 20, generator=generator)
    # 3 x 2 tiles of 8 px in patches of 2, a patch of overlap; an antialiased bicubic resize in f64.
    whole = F.interpolate(images.double(), (8, 8), mode="bicubic", align_corners=False, antialias=True)
    out = Path(__file__).parent.parent / "crates/defend-core/tests/golden/tiles.safetensors"
    save_file({"images": images, "whole": whole.float()}, out)
    print("wrote", out)
