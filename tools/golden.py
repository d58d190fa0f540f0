"""Shared by the golden_*.py scripts: where golden files go and how they are written."""

from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300_000


def write(crate, name, tensors):
    """Floats as f32, indices as u32, into crates/<crate>/tests/golden/<name>.safetensors."""
    path = ROOT / "crates" / crate / "tests/golden" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    out = {}
    for key, value in tensors.items():
        value = value.detach()
        out[key] = value.to(torch.float32 if value.is_floating_point() else torch.uint32).contiguous().clone()
        assert not value.is_floating_point() or torch.isfinite(out[key]).all(), key
    save_file(out, path)
    path.chmod(0o644)
    assert path.stat().st_size < LIMIT, path.stat().st_size
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes, {len(out)} tensors")
    for key in sorted(out):
        print(f"  {key} {list(out[key].shape)} {str(out[key].dtype).removeprefix('torch.')}")


def unit(x):
    """L2-normalised over the last axis."""
    return torch.nn.functional.normalize(x, dim=-1)


def sinkhorn(scores, eps=0.05, iterations=3):
    """SwAV's Sinkhorn-Knopp on scores [R,K] in float64 and the log domain; see golden_ot.py."""
    log_q = scores.double() / eps
    rows, prototypes = scores.shape
    log_q = log_q - log_q.logsumexp((0, 1))  # total mass one
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(0, keepdim=True) - torch.tensor(prototypes).double().log()
        log_q = log_q - log_q.logsumexp(1, keepdim=True) - torch.tensor(rows).double().log()
    return (log_q - log_q.logsumexp(1, keepdim=True)).exp()
