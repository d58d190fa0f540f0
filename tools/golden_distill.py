"""Golden values of defend-distill: the patch distance, its mean and the student's gradient.

Usage: python tools/golden_distill.py   (needs torch, safetensors)
Writes crates/defend-distill/tests/golden/distill.safetensors. Computed in float64 from f32 inputs,
stored as f32.

  teacher [2,9,6], student [2,9,6]       patch tokens
  <side>.<loss>.<norm>.distance [2,9]    per patch, summed over channels
  <side>.<loss>.<norm>.loss []           mean of distance over images and patches
  <side>.<loss>.<norm>.grad [2,9,6]      gradient of loss with respect to student

  side: both     teacher and student are normalised (eq. 3, 4 of the paper: both.squared.l2)
        teacher  only the teacher is
  loss: squared    (s - t)^2
        smooth_l1  0.5 d^2 for |d| < 1, else |d| - 0.5 (beta 1)
  norm: none; layer: (x - mean) / sqrt(population variance + 1e-6) over the 6 channels, no affine;
        l2: x / ||x|| over the channels
With norm none both sides agree.
"""

import torch
import torch.nn.functional as F
from golden import unit, write

NORMS = {"none": lambda x: x, "layer": lambda x: F.layer_norm(x, (6,), eps=1e-6), "l2": unit}
LOSSES = {
    "squared": lambda s, t: (s - t) ** 2,
    "smooth_l1": lambda s, t: F.smooth_l1_loss(s, t, beta=1.0, reduction="none"),
}


def main():
    torch.manual_seed(0)
    teacher = (1.5 * torch.randn(2, 9, 6) + 0.5).double()
    student = (0.7 * teacher.float() + torch.randn(2, 9, 6)).double().requires_grad_()
    out = {"teacher": teacher, "student": student}
    for side in ("both", "teacher"):
        for loss_name, loss_of in LOSSES.items():
            for norm_name, norm in NORMS.items():
                s = norm(student) if side == "both" else student
                distance = loss_of(s, norm(teacher)).sum(-1)
                loss = distance.mean()
                (grad,) = torch.autograd.grad(loss, student)
                key = f"{side}.{loss_name}.{norm_name}"
                out |= {f"{key}.distance": distance, f"{key}.loss": loss, f"{key}.grad": grad}
    difference = (student - teacher).abs()
    assert (difference < 1).any() and (difference > 1).any()  # both branches of smooth-L1
    write("defend-distill", "distill", out)


if __name__ == "__main__":
    main()
