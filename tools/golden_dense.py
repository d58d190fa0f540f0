"""Golden values of defend-dense: one step's loss and gradients of the dense fine-tuning stage.

Usage: python tools/golden_dense.py   (needs torch, torchvision, safetensors)
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
  roi.target [4,9,5]           torchvision.ops.roi_align (aligned, adaptive sampling) of q under each box, 3x3 places
  roi.loss, roi.grads.*        as above: the crop's scores go through roi_align to 3x3 too, over their whole grid
  all.boxes [100,4] u32        every box of the view
  all.area [100,4,5], all.roi [100,9,5]    q of image 0 under each: averaged to 2x2 after nearest upsampling by 12
                               and cropping, as the authors do in pixels; and roi_align to 3x3
  queue.view_tokens [2,16,12]  another batch, after view_tokens has been assigned
  queue.q [32,5]               its assignment together with the first 20 rows of the earlier batch
"""

import torch
import torchvision
from golden import sinkhorn, unit, write
from torch import nn

BOXES = [(0, 0, 2, 2), (1, 2, 3, 2), (2, 1, 2, 3), (0, 1, 3, 3)]
VIEW, CROP, CROPS, TAU, ROI = 4, 2, 2, 0.1, 3


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


def roi_align(maps, boxes, side):
    """maps [I,K,H,W], boxes (image, row, column, height, width) -> [boxes, side^2, K]"""
    rois = torch.tensor([[i, c, r, c + w, r + h] for i, r, c, h, w in boxes], dtype=torch.float64)
    found = torchvision.ops.roi_align(maps, rois, side, sampling_ratio=-1, aligned=True)
    return found.flatten(2).transpose(1, 2)


def maps(cells, side):
    """[I, side^2, K] -> [I,K,side,side]"""
    return cells.unflatten(1, (side, side)).permute(0, 3, 1, 2)


def every_box(q):
    spans = [(a, b - a) for a in range(VIEW) for b in range(a + 1, VIEW + 1)]
    boxes = [(r, c, h, w) for r, h in spans for c, w in spans]
    pixels = maps(q.reshape(2, VIEW * VIEW, -1)[:1], VIEW)
    large = nn.functional.interpolate(pixels, scale_factor=12, mode="nearest")
    area = [
        nn.functional.avg_pool2d(
            large[:, :, 12 * r : 12 * (r + h), 12 * c : 12 * (c + w)], (12 * h // CROP, 12 * w // CROP)
        )
        for r, c, h, w in boxes
    ]
    area = torch.cat(area).flatten(2).transpose(1, 2)
    return {
        "all.boxes": torch.tensor(boxes),
        "all.area": area,
        "all.roi": roi_align(pixels, [(0, *b) for b in boxes], ROI),
    }


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
    whole = [(i, 0, 0, CROP, CROP) for i in range(4)]
    target = roi_align(maps(q.reshape(2, VIEW * VIEW, 5), VIEW), [(i // CROPS, *b) for i, b in enumerate(BOXES)], ROI)
    met = roi_align(maps(crop_scores / TAU, CROP), whole, ROI)
    loss = -(target * met.log_softmax(-1)).sum(-1).mean()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    out |= {"roi.target": target, "roi.loss": loss} | {f"roi.grads.{k}": g for k, g in zip(leaves, grads)}
    out |= every_box(q)
    with torch.no_grad():
        later = torch.randn(2, 16, 12).double()
        rows = torch.cat([unit(head(later)).reshape(32, 8), z.reshape(32, 8)[:20]])
        out |= {"queue.view_tokens": later, "queue.q": sinkhorn(rows @ prototypes.t())[:32]}
    print("hard labels per prototype", hard_q.sum(0).tolist())
    write("defend-dense", "dense", out)


if __name__ == "__main__":
    main()
