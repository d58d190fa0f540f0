"""The other side of `cargo bench --bench versus`: the same work in PyTorch, onnxruntime, Pillow and torchvision.

Started by the Rust runner, one JSON request a line on standard input, one JSON answer a line on standard output:

  {"prepare": <row>, "engine": <name>, ...}   loads what the row needs; answers {"check": [numbers]}
  {"run": <times>}                            answers {"seconds": wall time of that many repetitions}
"""

import json
import os
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import reference  # noqa: E402

THREADS = int(os.environ["VERSUS_THREADS"])


def backbone(row):
    """timm's model with the runner's weights."""
    model = timm.create_model(row["model"], num_classes=0, dynamic_img_size=False)
    model.load_state_dict(load_file(row["weights"]), strict=True)
    return model


def forward(row, engine):
    model = backbone(row).eval().requires_grad_(False)
    images = load_file(row["images"])["images"]
    if engine == "onnxruntime":
        return onnx_forward(model, images)
    if engine == "torch in bf16":
        model, images = model.bfloat16(), images.bfloat16()

    @torch.inference_mode()
    def run():
        return model.forward_features(images)

    return run, lambda: run()[0, 0, :8].tolist()


class Tokens(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model.forward_features(images)


def onnx_forward(model, images):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "vit.onnx"
        # The exporter talks on standard output, which is ours.
        stdout, sys.stdout = sys.stdout, sys.stderr
        torch.onnx.export(Tokens(model), (images,), path, input_names=["images"], output_names=["tokens"])
        sys.stdout = stdout
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"images": images.numpy()}
    run = lambda: session.run(None, feed)[0]
    return run, lambda: run()[0, 0, :8].tolist()


def student_step(row, engine):
    student = backbone(row).train()
    tensors = load_file(row["images"])
    images, target, keep = tensors["images"], tensors["target"], tensors["keep"].long()
    student.pos_embed.requires_grad_(False)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def loss_of():
        patches, _ = reference.finish(student, reference.embed(student, images, keep))
        return reference.distances(target, patches).mean()

    def run():
        loss = loss_of()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return run, lambda: [loss_of().item()]


def dense_step(row, engine):
    vit = backbone(row).eval().requires_grad_(False)
    images = load_file(row["images"])["images"]
    dense = reference.settings({}).dense
    first = len(vit.blocks) - dense.trained_blocks
    vit.blocks[first:].requires_grad_(True)
    head = reference.projection_head([vit.embed_dim, *dense.head_hidden, dense.head_output])
    prototypes = torch.nn.Parameter(torch.randn(dense.prototypes, dense.head_output))
    trained = [*vit.blocks[first:].parameters(), *head.parameters(), prototypes]
    optimiser = torch.optim.AdamW(trained, lr=1e-6, weight_decay=1e-2, fused=True)
    grid = vit.patch_embed.grid_size
    with torch.no_grad():
        cached = vit.blocks[:first](reference.embed(vit, images))

    def run():
        boxes = reference.random_boxes(len(images) * dense.crops, *grid, dense)
        prototypes.data = F.normalize(prototypes.data, dim=-1)
        with torch.no_grad():
            view = reference.finish(vit, cached, first)[0]
            crops = reference.cut(images, boxes, 16, dense.crop_size)
            tokens = vit.blocks[:first](reference.embed(vit, crops))
        crops = reference.finish(vit, tokens, first)[0]
        loss = reference.dense_loss(head, prototypes, view, crops, boxes, dense, grid)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return run, lambda: []


def sinkhorn(row, engine):
    scores = load_file(row["images"])["scores"]
    run = lambda: reference.sinkhorn(scores, 0.05, 3)
    return run, lambda: run()[0, :8].tolist()


def images(row, engine):
    paths = [Path(p) for p in row["paths"]]
    pool = ThreadPoolExecutor(THREADS)

    def pillow(path):
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))

    resize = v2.Resize((224, 224), v2.InterpolationMode.BICUBIC, antialias=True)

    def tensors(path):
        data = torchvision.io.read_file(str(path))
        return resize(torchvision.io.decode_jpeg(data, torchvision.io.ImageReadMode.RGB))

    one = pillow if engine == "pillow" else tensors
    if engine == "torchvision":
        torch.set_num_threads(1)  # one image a thread
    run = lambda: list(pool.map(one, paths))
    check = lambda: [float(np.asarray(one(p)).astype(np.float64).mean() / 255) for p in paths[:8]]
    return run, check


def fit(row, engine):
    """From the files to a trained student; the teacher's features are kept, or with the engine's suffix computed each epoch."""
    config = reference.settings(reference.masked(row["config"]))

    def run():
        weights = reference.Weights(row["weights"])
        normal = reference.Photos(Path(row["voc"]), row["names"], weights)
        reference.fit(weights, config, 0, normal, recompute=engine.endswith("teacher each epoch"))

    return run, lambda: []


def score(row, engine):
    """From the files to a score for each image, with the student of a model file."""
    config, weights = reference.settings(reference.masked(row["config"])), reference.Weights(row["weights"])
    student = timm.create_model(weights.architecture, num_classes=0)
    tensors = load_file(row["detector"]).items()
    student.load_state_dict({k.removeprefix("student."): v for k, v in tensors if k.startswith("student.")})
    student.eval().requires_grad_(False)

    def run():
        photos = reference.Photos(Path(row["voc"]), row["names"], weights)
        found = reference.discrepancy(weights.teacher, student, photos, config.batch_size)
        return reference.aggregate(config.aggregation, *found)

    return run, lambda: run().tolist()


ROWS = {f.__name__: f for f in (forward, student_step, dense_step, sinkhorn, images, fit, score)}


def main():
    torch.set_num_threads(THREADS)
    run = None
    out = sys.stdout
    for line in sys.stdin:
        request = json.loads(line)
        if "prepare" in request:
            run = None
            torch.set_num_threads(THREADS)
            run, check = ROWS[request["prepare"]](request, request["engine"])
            answer = {"check": check()}
        else:
            start = time.perf_counter()
            for _ in range(request["run"]):
                run()
            answer = {"seconds": time.perf_counter() - start}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
