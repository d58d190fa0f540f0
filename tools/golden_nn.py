"""Golden values of defend-nn and defend-train: PyTorch's operations, AdamW and the cosine schedule.

Usage: python tools/golden_nn.py   (needs torch, safetensors)
Writes crates/defend-nn/tests/golden/ops.safetensors and crates/defend-train/tests/golden/training.safetensors (adamw, schedule). Computed in float64 from f32-representable
inputs, stored as f32. g is always the upstream gradient, dx the gradient of sum(y * g).

  layer_norm.{x [3,5,48], weight [48], bias [48], g, y, dx [3,5,48], dweight, dbias [48]}
                               eps 1e-6; every row of x has its own shift
  layer_norm_mean_100.*        the same names and shapes, x [3,5,48] has mean 100, deviation 1
  gelu.{x, g, y, dx}           [513], exact (erf), x = linspace(-8, 8, 513)
  linear.{x [2,7,24], weight [40,24], bias [40], g, y [2,7,40], dx [2,7,24], dweight, dbias}
  linear_gelu.{y, dx, dweight, dbias}    gelu(linear) with the inputs and g of linear.*
  attention.{qkv [2,9,72], g, out [2,9,24], dqkv [2,9,72], weights [2,3,9,9]}
                               3 heads of 8 channels; qkv.reshape(2, 9, 3, 3, 8): (q|k|v, head, channel);
                               weights = softmax(q k^T / sqrt(8)); out has the heads side by side
  softmax.{x [4,6,33], g, y, dx}    over the last axis; row [0,0] holds values near 1e4, in row [0,1]
                               one value leads by 200
  adamw.init.<p>               initial values of the parameters: w [4,6] and b [6] in group 0 (lr 1e-2,
                               weight decay 0.1), p [3,5] in group 1 (lr 1e-3, weight decay 0)
  adamw.grad.<p>.<step>        gradient before step 0..4; some entries are 0, some about 1e-9
  adamw.short.<p>.<step>       value after that step, betas (0.9, 0.95), eps 1e-8
  adamw.long.<p>.<step>        the same, betas (0.9, 0.999), eps 1e-8
  adamw.clipped.<p>.<step>     as long, gradients clipped to a norm of 6 together; adamw.norm.<step> [1] is the norm before
  schedule.<total>_<warmup> [total]    learning rate of step 0..total-1 with peak 1e-3, final 1e-5:
                               lr(step) = peak * (step + 1) / warmup               for step < warmup, else
                               final + 0.5 * (peak - final) * (1 + cos(pi * (step - warmup) / (total - warmup)))
                               (total, warmup) = (10, 0), (100, 10), (7, 3), (5, 5)
"""

import math

import torch
import torch.nn.functional as F
from golden import write

BETAS = {"short": (0.9, 0.95), "long": (0.9, 0.999), "clipped": (0.9, 0.999)}
CLIP = 6.0


def randn(*shape, scale=1.0, shift=0.0):
    """f32-representable values as a float64 leaf."""
    return (torch.randn(*shape) * scale + shift).float().double().requires_grad_()


def backward(f, g, **inputs):
    y = f(**inputs)
    grads = torch.autograd.grad((y * g).sum(), list(inputs.values()))
    return y, {f"d{k}": v for k, v in zip(inputs, grads)}


def norms(out):
    for name, shift in [("layer_norm", 3 * torch.randn(3, 5, 1)), ("layer_norm_mean_100", 100.0)]:
        inputs = {"x": randn(3, 5, 48, shift=shift), "weight": randn(48, shift=1.0), "bias": randn(48)}
        g = randn(3, 5, 48)
        y, grads = backward(lambda x, weight, bias: F.layer_norm(x, (48,), weight, bias, 1e-6), g, **inputs)
        out |= {f"{name}.{k}": v for k, v in (inputs | grads | {"g": g, "y": y}).items()}


def activations(out):
    x = torch.linspace(-8, 8, 513).double().requires_grad_()
    g = randn(513)
    y, grads = backward(lambda x: F.gelu(x), g, x=x)
    out |= {"gelu.x": x, "gelu.g": g, "gelu.y": y, "gelu.dx": grads["dx"]}

    x = randn(4, 6, 33, scale=3.0)
    with torch.no_grad():
        x[0, 0] += 1e4
        x[0, 1, 5] = x[0, 1].max() + 200
        x.copy_(x.float())
    g = randn(4, 6, 33)
    y, grads = backward(lambda x: x.softmax(-1), g, x=x)
    out |= {"softmax.x": x, "softmax.g": g, "softmax.y": y, "softmax.dx": grads["dx"]}


def linears(out):
    inputs = {"x": randn(2, 7, 24), "weight": randn(40, 24, scale=0.3), "bias": randn(40, scale=0.3)}
    g = randn(2, 7, 40)
    y, grads = backward(lambda x, weight, bias: F.linear(x, weight, bias), g, **inputs)
    out |= {f"linear.{k}": v for k, v in (inputs | grads | {"g": g, "y": y}).items()}
    y, grads = backward(lambda x, weight, bias: F.gelu(F.linear(x, weight, bias)), g, **inputs)
    out |= {f"linear_gelu.{k}": v for k, v in (grads | {"y": y}).items()}


def attention(out):
    qkv, g = randn(2, 9, 72, scale=1.5), randn(2, 9, 24)

    def split(qkv):
        return qkv.reshape(2, 9, 3, 3, 8).permute(2, 0, 3, 1, 4)

    def attend(qkv):
        q, k, v = split(qkv)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 9, 24)

    y, grads = backward(attend, g, qkv=qkv)
    q, k, v = split(qkv)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close((weights @ v).transpose(1, 2).reshape(2, 9, 24), y)
    out |= {"attention.qkv": qkv, "attention.g": g, "attention.out": y}
    out |= {"attention.dqkv": grads["dqkv"], "attention.weights": weights}


def adamw(out):
    shapes = {"w": (4, 6), "b": (6,), "p": (3, 5)}
    init = {k: randn(*s) for k, s in shapes.items()}
    grads = [{k: randn(*s).detach() for k, s in shapes.items()} for _ in range(5)]
    for step in grads:
        step["w"][0] = 0.0
        step["w"][1] = (step["w"][1] * 1e-9).float().double()
    out |= {f"adamw.init.{k}": v for k, v in init.items()}
    out |= {f"adamw.grad.{k}.{i}": v for i, step in enumerate(grads) for k, v in step.items()}
    for name, betas in BETAS.items():
        params = {k: v.detach().clone().requires_grad_() for k, v in init.items()}
        groups = [
            {"params": [params["w"], params["b"]], "lr": 1e-2, "weight_decay": 0.1},
            {"params": [params["p"]], "lr": 1e-3, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, betas=betas, eps=1e-8)
        for i, step in enumerate(grads):
            for k, p in params.items():
                p.grad = step[k].clone()
            if name == "clipped":
                norm = torch.nn.utils.clip_grad_norm_(list(params.values()), CLIP)
                out[f"adamw.norm.{i}"] = norm.detach().reshape(1)
            optimizer.step()
            out |= {f"adamw.{name}.{k}.{i}": p.detach().clone() for k, p in params.items()}


def schedule(out, peak=1e-3, final=1e-5):
    def rate(step, total, warmup):
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = (step - warmup) / (total - warmup)
        return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * progress))

    for total, warmup in [(10, 0), (100, 10), (7, 3), (5, 5)]:
        rates = [rate(step, total, warmup) for step in range(total)]
        out[f"schedule.{total}_{warmup}"] = torch.tensor(rates, dtype=torch.float64)


def main():
    torch.manual_seed(0)
    out = {}
    for part in (norms, activations, linears, attention, adamw, schedule):
        part(out)
    training = {k: v for k, v in out.items() if k.startswith(("adamw.", "schedule."))}
    write("defend-nn", "ops", {k: v for k, v in out.items() if k not in training})
    write("defend-train", "training", training)


if __name__ == "__main__":
    main()
