"""The PyTorch half of tools/gpu.sh: the same work as benches/gpu.rs, and one table of both.

    cargo bench -p defend-benches --features cuda --bench gpu > ours.jsonl
    python tools/gpu.py --ours ours.jsonl [--smoke] [--seconds 2]

f32 with TF32 off and on, and bf16 weights without autocast, as on the other side. PyTorch runs eagerly, with its fused
attention and its fused AdamW. The share of the peak is the work's FLOP/s over the larger of both sides' FLOP/s in one
large matrix product of the same precision, measured in the same run.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import timm
import torch

import reference

PRECISIONS = {"f32": torch.float32, "TF32": torch.float32, "bf16": torch.bfloat16}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", type=Path, required=True, help="what benches/gpu.rs printed")
    parser.add_argument("--smoke", action="store_true", help="tiny settings that run anywhere")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a measurement; each is the median of three")
    return parser.parse_args()


def models(smoke):
    if smoke:
        extents = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2)
        return {"smallest": lambda: timm.models.VisionTransformer(num_classes=0, **extents)}
    names = {"ViT-S": "vit_small_patch16_224", "ViT-B": "vit_base_patch16_224"}
    return {name: lambda timm_name=timm_name: timm.create_model(timm_name, num_classes=0) for name, timm_name in names.items()}


class Timer:
    def __init__(self, device, length):
        self.device, self.length = device, length

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, work, times):
        self.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            work()
        self.synchronize()
        return (time.perf_counter() - start) / times

    def seconds(self, work):
        """Of one repetition: the median of three measurements."""
        self.timed(work, 3)
        times = min(max(int(self.length / self.timed(work, 3)) + 1, 1), 10_000)
        return statistics.median(self.timed(work, times) for _ in range(3))


def peak(timer, side, dtype):
    a, b = (torch.randn(side, side, device=timer.device).to(dtype) for _ in range(2))
    return timer.seconds(lambda: a @ b)


def forward(timer, make, batch, dtype):
    model = make().to(timer.device, dtype).eval().requires_grad_(False)
    images = torch.randn(batch, 3, *model.patch_embed.img_size, device=timer.device).to(dtype)
    with torch.inference_mode():
        return timer.seconds(lambda: model.forward_features(images))


def student_step(timer, make, batch, dtype):
    student = make().to(timer.device, dtype).train()
    student.pos_embed.requires_grad_(False)
    kept = student.patch_embed.num_patches // 2
    images = torch.randn(batch, 3, *student.patch_embed.img_size, device=timer.device).to(dtype)
    target = torch.randn(batch, kept, student.embed_dim, device=timer.device).to(dtype)
    keep = (2 * torch.arange(kept, device=timer.device)).expand(batch, -1)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def step():
        patches, _ = reference.finish(student, reference.embed(student, images, keep))
        loss = reference.distances(target.float(), patches.float()).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return timer.seconds(step), kept + 1


def theirs(timer, smoke):
    """Seconds by work and precision."""
    found = {}
    for precision, dtype in PRECISIONS.items():
        if precision == "TF32" and timer.device.type != "cuda":
            continue
        allowed = precision == "TF32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
        found["peak", precision] = peak(timer, 256 if smoke else 8192, dtype)
        for name, make in models(smoke).items():
            for batch in (2, 4) if smoke else (32, 128):
                found[f"forward, {name}, batch {batch}", precision] = forward(timer, make, batch, dtype)
                seconds, tokens = student_step(timer, make, batch, dtype)
                found[f"student step, {name}, {tokens} tokens, batch {batch}", precision] = seconds
    return found


def table(ours, theirs, device):
    ours = {(row["work"], row["precision"]): row for row in ours}
    peak_flop = next(row["flop"] for (work, _), row in ours.items() if work == "peak")
    peaks = {}
    for precision in PRECISIONS:
        both = [row["seconds"] for key, row in ours.items() if key == ("peak", precision)]
        both += [seconds for key, seconds in theirs.items() if key == ("peak", precision)]
        peaks[precision] = max((peak_flop / seconds for seconds in both), default=None)
    kind = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    print(f"{kind}, PyTorch {torch.__version__}\n")
    print("| peak of a matrix product | " + " | ".join(PRECISIONS) + " |\n|---|" + "---|" * len(PRECISIONS))
    print("| TFLOP/s | " + " | ".join(f"{p / 1e12:.2f}" if p else "-" for p in peaks.values()) + " |\n")
    print("| | precision | ours, img/s | PyTorch, img/s | ours / PyTorch | ours, of peak | PyTorch, of peak |")
    print("|---|---|---|---|---|---|---|")
    # What both sides do costs the same, so a work that only one side ran still has its FLOP.
    work_flop = {work: (row["images"], row["flop"]) for (work, _), row in ours.items() if work != "peak"}
    for work, (images, flop) in work_flop.items():
        for precision, peak in peaks.items():
            mine, other = ours.get((work, precision)), theirs.get((work, precision))
            if mine is None and other is None:
                continue
            mine = mine and mine["seconds"]
            rate = lambda seconds: f"{images / seconds:.1f}" if seconds else "-"
            share = lambda seconds: f"{flop / seconds / peak:.0%}" if seconds else "-"
            ratio = f"{other / mine:.2f}" if mine and other else "-"
            print(f"| {work} | {precision} | {rate(mine)} | {rate(other)} | {ratio} | {share(mine)} | {share(other)} |")


def main():
    given = arguments()
    ours = [json.loads(line) for line in given.ours.read_text().splitlines() if line.startswith("{")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table(ours, theirs(Timer(device, given.seconds), given.smoke), device)


if __name__ == "__main__":
    main()
