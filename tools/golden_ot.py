"""Golden values of defend-ot: Sinkhorn-Knopp as SwAV runs it.

Usage: python tools/golden_ot.py   (needs torch, safetensors)
Writes crates/defend-ot/tests/golden/sinkhorn.safetensors. Computed in float64 and the log domain from
f32 scores, stored as f32.

Scores are [R,K]: rows are patches (samples), columns prototypes. Exactly, in this order:
  1. Q = exp(scores / eps); Q /= sum of all its entries
  2. per iteration: first the prototypes, Q[:, k] /= K * sum_r Q[r, k], so each column has mass 1/K;
     then the samples, Q[r, :] /= R * sum_k Q[r, k], so each row has mass 1/R
  3. Q[r, :] /= sum_k Q[r, k]: rows sum to one (SwAV's Q *= B, exact)
The samples are last: after few iterations rows are exact, columns (R/K each) only nearly.

  tall.scores [48,5], wide.scores [20,30]    cosines of random unit vectors in 8 dimensions; the first 24
                                 rows of tall.scores are drawn to prototype 0, so balancing has work to do
  <case>.q [R,K]                 eps 0.05, 3 iterations
  <case>.converged [R,K]         eps 0.05, 500 iterations: columns sum to R/K within 1e-6
  <case>.bad_scores [R,K]        10 * scores
  <case>.bad_q [R,K]             eps 0.01, 3 iterations on bad_scores: exponents up to +-1000, which overflow
                                 f32 and f64 alike. (Log domain in f32, PyTorch: within 4e-7 of
                                 these values; elsewhere the rounding of the exponents may cost 1e-4)
  <case>.iterations_1 [R,K]      eps 0.05, one iteration
"""

import torch
from golden import sinkhorn, unit, write


def plain(scores, eps, iterations):
    """SwAV's code, line by line, on Q^T."""
    q = torch.exp(scores.double() / eps).t()
    prototypes, samples = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / prototypes
        q = q / q.sum(0, keepdim=True) / samples
    return (q * samples).t()


def cosines(rows, prototypes, drawn):
    x, p = torch.randn(rows, 8), unit(torch.randn(prototypes, 8))
    x[:drawn] += 3 * p[0]
    return (unit(x) @ p.t()).float()


def main():
    torch.manual_seed(0)
    out = {}
    for case, scores in {"tall": cosines(48, 5, 24), "wide": cosines(20, 30, 0)}.items():
        rows, prototypes = scores.shape
        bad = 10 * scores
        out[f"{case}.scores"], out[f"{case}.bad_scores"] = scores, bad
        out[f"{case}.iterations_1"] = sinkhorn(scores, 0.05, 1)
        out[f"{case}.q"] = sinkhorn(scores, 0.05, 3)
        out[f"{case}.converged"] = sinkhorn(scores, 0.05, 500)
        out[f"{case}.bad_q"] = sinkhorn(bad, 0.01, 3)
        for iterations, key in [(1, "iterations_1"), (3, "q"), (500, "converged")]:
            torch.testing.assert_close(out[f"{case}.{key}"], plain(scores, 0.05, iterations), rtol=1e-9, atol=1e-12)
        off = (out[f"{case}.converged"].sum(0) - rows / prototypes).abs().max().item()
        print(f"{case}: columns after 500 iterations are off by at most {off:.1e}")
        assert off < 1e-6
    write("defend-ot", "sinkhorn", out)


if __name__ == "__main__":
    main()
