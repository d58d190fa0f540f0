"""Golden values of defend-dense: one step's loss and gradients of the dense fine-tuning stage.

Usage: python tools/golden_dense.py   (needs torch, safetensors)
Writes crates/defend-dense/tests/golden/dense.safetensors. Computed in float64 from f32-representable
inputs, stored as f32 (boxes u32).

2 images, a view grid of 4x4 cells, 2 crops an image with a grid of 2x2 cells; crops are image-major: 0 and
1 belong to image 0, 2 and 3 to image 1. Cells are in row-major order.

  head.<0..2>.{weight, bias}   Linear-GELU(erf)-Linear-GELU-Linear, 12-16-16-8
  prototypes [5,8]             L2-normalised; a leaf: no gradient through that normalisation
  view_tokens [2,16,12]        full views; crop_tokens [4,4,12]: crops
  boxes [4,4] u32              (row, column, height, width) of each crop's box in view cells
  z [2,16,8], crop_z [4,4,8]   L2norm(head(tokens))
  scores [32,5]                z p^T, rows image-major then cell; crop_scores [4,4,5] = crop_z p^T
  q [32,5]                     Sinkhorn over all 32 rows, eps 0.05, 3 iterations, rows sum to one
                               (golden_ot.py has the order); no gradient
  hard_q [32,5]                one-hot argmax of q
  <v>.target [4,4,5]           v = hard | soft: area-weighted mean of the rows of hard_q | q of the crop's
                               image under each crop cell. A box's height and width are cut in 2 equal
                               parts; a view cell counts with the share of the crop cell it covers
  <v>.loss []                  mean over crops and cells of -sum_k target_k log_softmax(crop_scores / 0.1)_k
  <v>.grads.head.<i>.{weight, bias}, <v>.grads.prototypes, <v>.grads.crop_tokens
                               gradients of that loss (only through the crops)
"""

import torch
from golden import sinkhorn, unit, write
from torch import nn

BOXES = [(0, 0, 2, 2), (1, 2, 3, 2), (2, 1, 2, 3), (0, 1, 3, 3)]
VIEW, CROP, CROPS, TAU = 4, 2, 2, 0.1


def overlaps(start, length):
    """[CROP, VIEW]: the share of crop cell i that view cell j covers, along one axis."""
    step = length / CROP
    return torch.tensor(
        [
            [max(0.0, min(start + (i + 1) * step, j + 1) - max(start + i * step, j)) / step for j in range(VIEW)]
            for i in range(CROP)
        ],
        dtype=torch.float64,
    )


def targets(q):
    q = q.reshape(-1, VIEW, VIEW, q.shape[-1])
    out = []
    for crop, (row, column, height, width) in enumerate(BOXES):
        resampled = torch.einsum(
            "ai,bj,ijk->abk", overlaps(row, height), overlaps(column, width), q[crop // CROPS]
        )
        out.append(resampled.reshape(CROP * CROP, -1))
    out = torch.stack(out)
    torch.testing.assert_close(out.sum(-1), torch.ones_like(out[..., 0]))
    return out


def main():
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 8))
    with torch.no_grad():
        for p in head.parameters():  # wider than PyTorch's own: features of all directions
            p.copy_(torch.randn_like(p) * (0.5 if p.dim() == 2 else 0.2))
    head = head.double()
    prototypes = unit(torch.randn(5, 8)).double().requires_grad_()
    view_tokens = torch.randn(2, 16, 12).double()
    crop_tokens = torch.randn(4, 4, 12).double().requires_grad_()
    leaves = {"prototypes": prototypes, "crop_tokens": crop_tokens}
    leaves |= {f"head.{i}.{n}": p for i in range(3) for n, p in head[2 * i].named_parameters()}

    with torch.no_grad():
        z = unit(head(view_tokens))
        scores = z.reshape(32, 8) @ prototypes.t()
        q = sinkhorn(scores)
        top = q.topk(2).values
        assert (top[:, 0] - top[:, 1]).min() > 0.01, "an argmax nearly tied: take another seed"
        hard_q = nn.functional.one_hot(q.argmax(-1), 5).double()
    crop_z = unit(head(crop_tokens))
    crop_scores = crop_z @ prototypes.t()
    out = leaves | {
        "view_tokens": view_tokens,
        "boxes": torch.tensor(BOXES),
        "z": z,
        "scores": scores,
        "q": q,
        "hard_q": hard_q,
        "crop_z": crop_z,
        "crop_scores": crop_scores,
    }
    for variant, labels in {"hard": hard_q, "soft": q}.items():
        target = targets(labels)
        loss = -(target * (crop_scores / TAU).log_softmax(-1)).sum(-1).mean()
        grads = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
        out |= {f"{variant}.target": target, f"{variant}.loss": loss}
        out |= {f"{variant}.grads.{k}": g for k, g in zip(leaves, grads)}
        print(f"{variant} loss {loss.item():.4f}")
    print("hard labels per prototype", hard_q.sum(0).tolist())
    write("defend-dense", "dense", out)


if __name__ == "__main__":
    main()
