"""The whole method in PyTorch and timm: what the Rust crates do, in one file, to compare AUROC and time.

Usage: python tools/reference.py --voc VOCdevkit/VOC2012 --weights weights/vit_tiny_patch16_224 \\
           [--config examples/voc/alone.json] [--epochs 6] [--batch 16] [--no-dense] [--seeds 0,1,2] \\
           [--test-stride 1] [--threads 2] [--recompute-teacher] [--json figures.json] horse person

Trains on the VOC images of train.txt that show a class and tells those of val.txt that show it from those that do not,
as `cargo run --release --bin voc` does. Prints AUROC (abnormal is positive), seconds, losses and memory of every class
and seed, then a Markdown table over the seeds. Rust's time of a fit holds more than `fit` here: reading the training
images, loading the teacher, and scoring up to 128 images for the scale of the heat maps.

--weights is a folder as on the timm hub: config.json and model.safetensors. --config takes the settings of the Rust
example (`DefendConfig`) with the same defaults; an unknown field is an error, and so are `resize_mode`, `distance` and
`cache_bytes`, which have no counterpart here. Random streams differ from Rust's: compare means over seeds.
"""

import argparse
import copy
import json
import math
import resource
import statistics
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

# settings

# The defaults of Rust's `DefendConfig`.
DENSE = (
    dict(epochs=3, batch_size=32, crops=4, crop_size=96, crop_area=[0.1, 0.3], crop_aspect=[3 / 4, 4 / 3])
    | dict(head_hidden=[2048, 2048], head_output=256, prototypes=5, sinkhorn={"epsilon": 0.05, "iterations": 3})
    | dict(assignment="hard", temperature=0.1, trained_blocks=2)
    | dict(backbone_learning_rate=1e-5, head_learning_rate=1e-4, weight_decay=1e-2)
)
DISTILL = (
    dict(epochs=10, min_steps=0, batch_size=32, mask={"keep-salient": {"ratio": 0.5, "selection": "sampled"}})
    | dict(cls_weight=1.0, learning_rate=1e-3, schedule={"cosine": {"warmup": 0.1, "floor": 0.01}}, weight_decay=0.05)
    | dict(betas=[0.9, 0.95], drop_path=0.1)
)
DEFAULTS = dict(seed=0, dense=DENSE, distill=DISTILL, aggregation={"patches-and-cls": {"weight": 1.0}}, batch_size=32)
# Choices and their fields: in JSON a name, or {name: fields}.
CHOICES = {
    "mask": {"none": "", "random": "ratio", "keep-salient": "ratio selection", "hide-salient": "ratio selection"},
    "schedule": {"constant": "", "cosine": "warmup floor"},
    "assignment": {"hard": "", "soft": ""},
    "aggregation": {"mean": "", "attention-weighted": "", "best-patches": "share", "worst-patches": "share"}
    | {"cls": "", "patches-and-cls": "weight"},
}


def settings(given, defaults=DEFAULTS):
    """Settings over their defaults; choices become (name, fields)."""
    if unknown := given.keys() - defaults:
        raise ValueError(f"unknown settings: {', '.join(unknown)}")
    found = SimpleNamespace()
    for key, value in (defaults | given).items():
        if key in CHOICES:
            name, fields = (value, {}) if isinstance(value, str) else [*value.items()][0]
            if name not in CHOICES[key] or fields.keys() != set(CHOICES[key][name].split()):
                raise ValueError(f"{key} is {json.dumps(value)}, expected one of {CHOICES[key]}")
            value = (name, fields)
        elif isinstance(defaults[key], dict) and (key, value) != ("dense", None):
            value = settings(value, defaults[key])
        setattr(found, key, value)
    return found


def masked(given):
    """The library's settings of a masked student, {"dense", "student": {"masked": {...}}}, as one level."""
    student = given.get("student", {})
    if "masked" not in student:
        raise ValueError("only the masked student is built here: expected \"student\": {\"masked\": ...}")
    rest = {key: value for key, value in given.items() if key != "student"}
    return {"dense": None} | rest | student["masked"]


def printed_scores(config):
    """The scores of docs/RESULTS.md, and the configured one if it is another."""
    scores = {"patches": ("mean", {})}
    if config.distill.cls_weight > 0:
        scores |= {"CLS": ("cls", {}), "patches + CLS": ("patches-and-cls", {"weight": 1.0})}
    elif "cls" in config.aggregation[0]:
        raise ValueError("the aggregation reads the CLS token, which distill.cls_weight 0 does not train")
    return scores if config.aggregation in scores.values() else scores | {"configured": config.aggregation}


def rounded(x):
    """Halves away from zero as in Rust; Python's round takes them to even."""
    return math.floor(x + 0.5)


# images


def split(voc, name):
    return [line.split()[0] for line in (voc / f"ImageSets/Main/{name}.txt").open() if line.strip()]


def shows(voc, name):
    """Classes of the objects in an image; difficult ones count."""
    objects = ElementTree.parse(voc / f"Annotations/{name}.xml").findall("object")
    return {o.findtext("name").strip() for o in objects}


class Photos:
    """Images squashed to the backbone's size, kept as bytes."""

    def __init__(self, voc, names, weights):
        size, filter = weights.size, Image.Resampling[weights.preprocess["interpolation"].upper()]

        def read(name):
            with Image.open(voc / f"JPEGImages/{name}.jpg") as image:
                return np.asarray(image.convert("RGB").resize((size, size), filter)).transpose(2, 0, 1)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            self.bytes = torch.from_numpy(np.stack(list(pool.map(read, names))))
        self.mean, self.std = (torch.tensor(weights.preprocess[k]).view(3, 1, 1) for k in ("mean", "std"))

    def __len__(self):
        return len(self.bytes)

    def __getitem__(self, indices):
        return (self.bytes[indices].float() / 255 - self.mean) / self.std


def train(optimiser, rate, epochs, batch, images, loss_of):
    """Steps over shuffled batches, of which an epoch's last may be smaller; mean loss of each epoch."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for indices in torch.randperm(images).split(batch):
            loss = loss_of(indices.tolist())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * len(indices)
        losses.append(total / images)
    return losses


class Frozen:
    """Results of a frozen network, which without augmentation are the same in every epoch: kept unless `recompute`."""

    def __init__(self, compute, recompute):
        self.compute, self.recompute, self.rows = compute, recompute, {}

    @torch.no_grad()
    def __call__(self, indices):
        if self.recompute:
            return self.compute(indices)
        if missing := [i for i in indices if i not in self.rows]:
            for i, *row in zip(missing, *self.compute(missing)):
                self.rows[i] = [tensor.clone() for tensor in row]
        return [torch.stack(tensors) for tensors in zip(*(self.rows[i] for i in indices))]


# backbone (METHOD.md, section 0)


class Weights:
    def __init__(self, folder):
        config = json.loads((Path(folder) / "config.json").read_text())
        self.architecture, self.preprocess = config["architecture"], config["pretrained_cfg"]
        self.teacher = timm.create_model(self.architecture, num_classes=config["num_classes"])
        self.teacher.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=True)
        self.teacher.eval().requires_grad_(False)
        self.size = self.teacher.patch_embed.img_size[0]


def embed(vit, images, keep=None):
    """Tokens that enter the first block: CLS and the patches, or the kept ones (`keep`: [B, M] indices)."""
    patches = vit.patch_embed.proj(images)
    positions = vit.pos_embed[:, 1:].unflatten(1, vit.patch_embed.grid_size).permute(0, 3, 1, 2)
    if positions.shape[2:] != patches.shape[2:]:
        positions = F.interpolate(positions, size=patches.shape[2:], mode="bicubic", align_corners=False)
    patches = (patches + positions).flatten(2).transpose(1, 2)
    if keep is not None:
        patches = gather(patches, keep)
    cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(patches), -1, -1)
    return torch.cat([cls, patches], 1)


def gather(patches, keep):
    return patches.gather(1, keep.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))


def finish(vit, tokens, first=0):
    """Patches [B, N, D_v] and CLS [B, D_v] after blocks `first`.. and the final norm."""
    tokens = vit.norm(vit.blocks[first:](tokens))
    return tokens[:, 1:], tokens[:, 0]


def guided_features(vit, images):
    """Patches, CLS, and the CLS token's attention to the patches in the last block, mean over heads [B, N]."""
    tokens = vit.blocks[:-1](embed(vit, images))
    block = vit.blocks[-1]
    qkv = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, block.attn.num_heads, -1))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    attention = (q[:, :, :1] @ k.transpose(-2, -1) * block.attn.scale).softmax(-1)
    return *finish(vit, tokens, len(vit.blocks) - 1), attention[:, :, 0, 1:].mean(1)


def sin_cos(rows, columns, width):
    """MAE's fixed positional embedding: columns in the first half of the channels, rows in the second."""
    frequencies = 10_000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [position.flatten()[:, None] * frequencies for position in (column, row)]
    return torch.cat([wave for a in angles for wave in (a.sin(), a.cos())], 1).float()


def random_student(architecture, drop_path):
    vit = timm.create_model(architecture, num_classes=0, drop_path_rate=drop_path)
    for name, p in vit.named_parameters():
        if name == "cls_token":
            nn.init.normal_(p, std=0.02)
        elif name == "pos_embed":
            fixed = sin_cos(*vit.patch_embed.grid_size, vit.embed_dim)
            p.requires_grad_(False).copy_(F.pad(fixed, (0, 0, 1, 0)))
        elif p.ndim > 1:
            nn.init.xavier_uniform_(p.data.flatten(1))
        else:
            nn.init.constant_(p, float("norm" in name and name.endswith("weight")))
    return vit.train()


# dense fine-tuning (METHOD.md, section 1)


def random_boxes(count, rows, columns, dense):
    """Crops on the patch grid: row, column, height, width, each [count]."""
    u = torch.rand(4, count, dtype=torch.float64)
    uniform = lambda u, low, high: low + (high - low) * u
    area = uniform(u[0], *dense.crop_area) * rows * columns
    aspect = uniform(u[1], *map(math.log, dense.crop_aspect)).exp()
    height = (area / aspect).sqrt().round().clamp(1, rows)
    width = (area * aspect).sqrt().round().clamp(1, columns)
    row, column = (u[2] * (rows - height + 1)).floor(), (u[3] * (columns - width + 1)).floor()
    return torch.stack([row, column, height, width]).long()


def cut(images, boxes, patch, size):
    """Boxes, image by image, resized to `size` pixels: [boxes, 3, size, size]."""
    crops = boxes.shape[1] // len(images)
    resized = []
    for i, (row, column, height, width) in enumerate((boxes.T * patch).tolist()):
        pixels = images[i // crops, None, :, row : row + height, column : column + width]
        resized.append(F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True))
    return torch.cat(resized)


@torch.no_grad()
def sinkhorn(scores, epsilon, iterations):
    """Balanced assignment of rows to prototypes; rows sum to one. Logarithms, since exp(1 / 0.05) overflows f16."""
    log_q = scores / epsilon
    rows, prototypes = scores.shape
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(0, keepdim=True) - math.log(prototypes)
        log_q = log_q - log_q.logsumexp(1, keepdim=True) - math.log(rows)
    return log_q.softmax(1)


def overlap(start, length, cells, parts):
    """Share of each of `cells` in each of `parts` equal parts of a box's axis: [boxes, parts, cells]."""
    edges = start[:, None] + length[:, None] * torch.arange(parts + 1) / parts
    cell = torch.arange(cells)
    inside = edges[:, 1:, None].minimum(cell + 1) - edges[:, :-1, None].maximum(cell)
    return inside.clamp(min=0) * parts / length[:, None, None]


def crop_targets(q, boxes, parts):
    """alpha(Q): cells of `q` [B, rows, columns, K] under each box, by area: [boxes, parts^2, K]."""
    row, column, height, width = boxes
    q = q.repeat_interleave(boxes.shape[1] // len(q), 0)
    down, across = overlap(row, height, q.shape[1], parts), overlap(column, width, q.shape[2], parts)
    return torch.einsum("nai,nbj,nijk->nabk", down, across, q).flatten(1, 2)


def projection_head(widths):
    layers = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.GELU()]
        nn.init.xavier_uniform_(layers[-2].weight)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


def dense_loss(head, prototypes, view, crops, boxes, dense, grid):
    """H(softmax(z' p^T / tau), alpha(Q)), mean over positions, crops and images."""
    with torch.no_grad():
        scores = F.normalize(head(view), dim=-1).flatten(0, 1) @ prototypes.T
        q = sinkhorn(scores, dense.sinkhorn.epsilon, dense.sinkhorn.iterations)
        if dense.assignment[0] == "hard":
            q = F.one_hot(q.argmax(1), dense.prototypes).float()
        targets = crop_targets(q.unflatten(0, (-1, *grid)), boxes, math.isqrt(crops.shape[1]))
    log_p = (F.normalize(head(crops), dim=-1) @ prototypes.T / dense.temperature).log_softmax(-1)
    return -(targets * log_p).sum(-1).mean()


def tune(vit, photos, dense, recompute):
    """Fine-tunes the last blocks of `vit` in place; mean loss of each epoch."""
    grid, patch = vit.patch_embed.grid_size, vit.patch_embed.patch_size[0]
    first = len(vit.blocks) - dense.trained_blocks
    vit.blocks[first:].requires_grad_(True)
    head = projection_head([vit.embed_dim, *dense.head_hidden, dense.head_output])
    prototypes = nn.Parameter(torch.randn(dense.prototypes, dense.head_output))
    groups = [
        {"params": vit.blocks[first:].parameters(), "lr": dense.backbone_learning_rate},
        {"params": [*head.parameters(), prototypes], "lr": dense.head_learning_rate},
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=dense.weight_decay)
    prefix = lambda images: vit.blocks[:first](embed(vit, images))
    views = Frozen(lambda indices: [prefix(photos[indices])], recompute)

    def loss_of(indices):
        images = photos[indices]
        boxes = random_boxes(len(images) * dense.crops, *grid, dense)
        prototypes.data = F.normalize(prototypes.data, dim=-1)
        with torch.no_grad():
            view = finish(vit, *views(indices), first)[0]
            tokens = prefix(cut(images, boxes, patch, dense.crop_size))
        return dense_loss(head, prototypes, view, finish(vit, tokens, first)[0], boxes, dense, grid)

    losses = train(optimiser, lambda step: 1.0, dense.epochs, dense.batch_size, len(photos), loss_of)
    vit.requires_grad_(False)
    return losses


# masked distillation (METHOD.md, section 2)


def kept_patches(attention, mask):
    """Indices of the patches that the student sees, [B, M]; None for all."""
    name, fields = mask
    patches = attention.shape[1]
    hidden = min(rounded(fields.get("ratio", 0) * patches), patches - 1)
    if hidden == 0:
        return None
    weights = torch.ones_like(attention) if name == "random" else attention.clamp(min=1e-12)
    draw = {
        "sampled": lambda count: torch.multinomial(weights, count),
        "top-k": lambda count: weights.topk(count).indices,
    }[fields.get("selection", "sampled")]
    if name == "hide-salient":
        seen = torch.ones_like(attention, dtype=torch.bool).scatter(1, draw(hidden), False)
        return seen.nonzero()[:, 1].view(len(attention), -1)
    return draw(patches - hidden)


def distances(teacher, student):
    """Squared distance of unit vectors, 0..4 (eqs. 3 and 4)."""
    return (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum(-1)


def multiplier(schedule, step, steps):
    name, fields = schedule
    if name == "constant":
        return 1.0
    warm, floor = rounded(fields["warmup"] * steps), fields["floor"]
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(steps - warm, 1)
    return floor + 0.5 * (1 - floor) * (1 + math.cos(math.pi * progress))


def distill(teacher, student, photos, config, recompute):
    """Trains `student` in place; mean loss of each epoch."""
    trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    decays = lambda name, p: p.ndim > 1 and name != "cls_token"
    groups = [
        {"params": [p for name, p in trained if decays(name, p)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in trained if not decays(name, p)], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)
    steps_per_epoch = math.ceil(len(photos) / config.batch_size)
    epochs = max(config.epochs, math.ceil(config.min_steps / steps_per_epoch))
    rate = lambda step: multiplier(config.schedule, step, epochs * steps_per_epoch)
    targets = Frozen(lambda indices: guided_features(teacher, photos[indices]), recompute)

    def loss_of(indices):
        patches, cls, attention = targets(indices)
        keep = kept_patches(attention, config.mask)
        seen = patches if keep is None else gather(patches, keep)
        student_patches, student_cls = finish(student, embed(student, photos[indices], keep))
        loss = distances(seen, student_patches).mean()
        if config.cls_weight > 0:
            loss = loss + config.cls_weight * distances(cls, student_cls).mean()
        return loss

    losses = train(optimiser, rate, epochs, config.batch_size, len(photos), loss_of)
    student.eval()
    return losses


# score (METHOD.md, section 3)


@torch.no_grad()
def discrepancy(teacher, student, photos, batch):
    """Distances of all patches [I, N] and CLS tokens [I] without a mask, and the teacher's attention [I, N]."""
    found = []
    for indices in torch.arange(len(photos)).split(batch):
        images = photos[indices]
        patches, cls, attention = guided_features(teacher, images)
        student_patches, student_cls = finish(student, embed(student, images))
        found.append((distances(patches, student_patches), distances(cls, student_cls), attention))
    return [torch.cat(parts).double() for parts in zip(*found)]


def aggregate(aggregation, patches, cls, attention):
    """One score an image, larger for more novel."""
    name, fields = aggregation
    if name in ("best-patches", "worst-patches"):
        count = max(rounded(fields["share"] * patches.shape[1]), 1)
        return patches.topk(count, largest=name == "worst-patches").values.mean(1)
    return {
        "mean": lambda: patches.mean(1),
        "attention-weighted": lambda: (patches * attention).sum(1) / attention.sum(1),
        "cls": lambda: cls,
        "patches-and-cls": lambda: patches.mean(1) + fields["weight"] * cls,
    }[name]()


def auroc(scores, abnormal):
    """Share of (abnormal, normal) pairs in the right order, ties half: the rank sum of the abnormal images."""
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2)[group]
    positives = abnormal.sum()
    return (ranks[abnormal].sum() - positives * (positives + 1) / 2) / (positives * (~abnormal).sum())


# protocol (METHOD.md, section 4)


def fit(weights, config, seed, normal, recompute):
    """Teacher, student, and the mean losses of each epoch of both stages."""
    teacher, dense_losses = weights.teacher, []
    if config.dense:
        torch.manual_seed(seed)
        teacher = copy.deepcopy(teacher)
        dense_losses = tune(teacher, normal, config.dense, recompute)
    torch.manual_seed(seed)  # so that the student is the same with and without the dense stage
    student = random_student(weights.architecture, config.distill.drop_path)
    losses = distill(teacher, student, normal, config.distill, recompute)
    return teacher, student, dense_losses, losses


def run(weights, config, seed, normal, test, abnormal, recompute):
    """One fit and its figures."""
    start = time.perf_counter()
    teacher, student, dense_losses, losses = fit(weights, config, seed, normal, recompute)
    fitted = time.perf_counter()
    found = discrepancy(teacher, student, test, config.batch_size)
    # f32 as in Rust, where close scores become ties.
    scores = {name: aggregate(how, *found).float().numpy() for name, how in printed_scores(config).items()}
    return {
        "auroc": {name: float(auroc(values, abnormal)) for name, values in scores.items()},
        "dense_losses": dense_losses,
        "losses": losses,
        "fit_seconds": fitted - start,
        "score_seconds": time.perf_counter() - fitted,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def report(figures):
    loss = lambda losses: f"{losses[0]:.4f} -> {losses[-1]:.4f}"
    dense = f", dense loss {loss(figures['dense_losses'])}" if figures["dense_losses"] else ""
    seconds = ", ".join(f"{stage} {figures[f'{stage}_seconds']:.1f} s" for stage in ("read", "fit", "score"))
    print(f"  seed {figures['seed']}: AUROC " + ", ".join(f"{k} {v:.4f}" for k, v in figures["auroc"].items()))
    print(f"    {seconds}; peak {figures['peak_mib']:.0f} MiB; loss {loss(figures['losses'])}{dense}", flush=True)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", type=Path, required=True, help="folder with Annotations, ImageSets and JPEGImages")
    parser.add_argument("--weights", type=Path, required=True, help="timm folder of the teacher")
    parser.add_argument("--config", type=Path, help="settings of the Rust example, JSON")
    parser.add_argument("--epochs", type=int, help="of the distillation; overrides --config")
    parser.add_argument("--batch", type=int, help="images a step of the distillation; overrides --config")
    parser.add_argument("--no-dense", action="store_true", help="leaves the dense stage out")
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], help="default: the config's")
    parser.add_argument("--test-stride", type=int, default=1, help="uses only every n-th test image")
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--recompute-teacher", action="store_true", help="in every epoch, as the authors do")
    parser.add_argument("--json", type=Path, help="writes all figures to this file")
    parser.add_argument("classes", nargs="+", help="normal classes, one experiment each")
    return parser.parse_args()


def main():
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    config = settings(masked(json.loads(args.config.read_text())) if args.config else {})
    if args.no_dense:
        config.dense = None
    config.distill.epochs = args.epochs or config.distill.epochs
    config.distill.batch_size = args.batch or config.distill.batch_size
    printed_scores(config)  # refuses what does not fit before any work

    weights = Weights(args.weights)
    train_split, test_names = split(args.voc, "train"), split(args.voc, "val")[:: args.test_stride]
    start = time.perf_counter()
    test = Photos(args.voc, test_names, weights)
    test_seconds = time.perf_counter() - start
    print(f"{len(test)} test images read in {test_seconds:.1f} s, {torch.get_num_threads()} threads", flush=True)
    runs = []
    for name in args.classes:
        train_names = [n for n in train_split if name in shows(args.voc, n)]
        if not train_names:
            raise SystemExit(f"no training image shows the class {name!r}")
        abnormal = np.array([name not in shows(args.voc, n) for n in test_names])
        start = time.perf_counter()
        normal = Photos(args.voc, train_names, weights)
        read_seconds = time.perf_counter() - start
        normals = (~abnormal).sum()
        print(f"{name}: {len(normal)} training images, {normals} normal and {abnormal.sum()} abnormal test images")
        for seed in args.seeds or [config.seed]:
            figures = run(weights, config, seed, normal, test, abnormal, args.recompute_teacher)
            runs.append({"class": name, "seed": seed, "read_seconds": read_seconds} | figures)
            report(runs[-1])
    print("\n| score | class | AUROC | deviation |\n|---|---|---|---|")
    for score in runs[0]["auroc"]:
        for name in args.classes:
            values = [r["auroc"][score] for r in runs if r["class"] == name]
            deviation = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"
            print(f"| {score} | {name} | {statistics.mean(values):.4f} | {deviation} |")
    if args.json:
        arguments = vars(args) | {"threads": torch.get_num_threads()}
        figures = {"config": config, "arguments": arguments, "test_read_seconds": test_seconds, "runs": runs}
        plain = lambda x: str(x) if isinstance(x, Path) else vars(x)
        args.json.write_text(json.dumps(figures, indent=1, default=plain) + "\n")


if __name__ == "__main__":
    main()
