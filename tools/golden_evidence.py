"""Golden values for defend-evidence: the closed form's formulas (docs/METHOD.md) in PyTorch and f64, on small random embeddings.

    python tools/golden_evidence.py        # writes crates/defend-evidence/tests/golden/evidence.safetensors

Two sets: `varied`, where ordinary images are contrasted with, and `alike`, where patches count. Some images have near copies.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

FIRST, RIDGE, WIDTH, CONTRAST_WIDTH, CONTRAST_RIDGE, WORST, HESITATION, OBJECT_WIDTH, FAULT_RIDGE = 1.5, 0.1, 1.5, 1.0, 1.0, 5, 2.0, 6.0, 1e-4


def unit(x):
    return F.normalize(x.double(), dim=-1)


def phi(parts, first=1.0):
    return unit(torch.cat([unit(part) * (first if i == 0 else 1.0) for i, part in enumerate(parts)], 1))


def squared_distances(a, b):
    return (2 - 2 * a @ b.T).clamp_min(0)


def leaders(x, share=0.2):
    """Greedy k-centre from the medoid: the leaders' rows, and the leader that each row is nearest to."""
    d = squared_distances(x, x)
    radius = share * float(d[tuple(torch.triu_indices(len(x), len(x), 1))].median())
    chosen = [int(d.sum(1).argmin())]
    nearest = d[chosen[0]].clone()
    while float(nearest.max()) > radius:
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, d[chosen[-1]])
    chosen = torch.tensor(chosen)
    return chosen, d[:, chosen].argmin(1)


def blocks_without_group(inverse, groups):
    for group in groups.unique():
        rows = (groups == group).nonzero().flatten()
        yield rows, torch.linalg.inv(inverse[rows][:, rows])


def posterior(x, groups, g, *queries):
    kernel = lambda a, b: torch.exp(-g * squared_distances(a, b))
    inverse = torch.linalg.inv(kernel(x, x) + RIDGE * torch.eye(len(x), dtype=torch.double))
    left_out = torch.empty(len(x), dtype=torch.double)
    for rows, block in blocks_without_group(inverse, groups):
        left_out[rows] = block.diagonal() - RIDGE
    logs = [left_out.clamp_min(1e-7).log()]
    for q in queries:
        k = kernel(q, x)
        logs.append((1 - ((k @ inverse) * k).sum(1)).clamp_min(1e-7).log())
    return logs


def contrast(x, groups, background, query):
    near = (background @ x.T).topk(min(5, len(x)), 1).values.mean(1)
    background = background[near.argsort()[: int(len(background) * 0.9)]]
    both, n, m = torch.cat([x, background]), len(x), len(background)
    y = torch.cat([torch.ones(n), -torch.ones(m)]).double()
    weight = torch.cat([torch.full((n,), 0.5 / n), torch.full((m,), 0.5 / m)]).double() * (n + m)
    kernel = torch.exp(-CONTRAST_WIDTH * squared_distances(both, both))
    inverse = torch.linalg.inv(kernel + CONTRAST_RIDGE * torch.diag(1 / weight))
    alpha = inverse @ y
    left_out = torch.empty(n, dtype=torch.double)
    for rows, block in blocks_without_group(inverse[:n, :n], groups):
        left_out[rows] = y[rows] - block @ alpha[rows]
    return -left_out, -(torch.exp(-CONTRAST_WIDTH * squared_distances(query, both)) @ alpha)


def ridge_contrast(x, groups, negatives, weights):
    """Kernel ridge regression of x (+1) against weighed negatives (-1): alpha, all rows, left-out values of x and of the negatives."""
    both, n, m = torch.cat([x, negatives]), len(x), len(negatives)
    y = torch.cat([torch.ones(n), -torch.ones(m)]).double()
    weight = torch.cat([torch.full((n,), 0.5 / n, dtype=torch.double), 0.5 * weights / weights.sum()]) * (n + m)
    inverse = torch.linalg.inv(torch.exp(-CONTRAST_WIDTH * squared_distances(both, both)) + CONTRAST_RIDGE * torch.diag(1 / weight))
    alpha = inverse @ y
    left_out = y - alpha / inverse.diagonal()
    for rows, block in blocks_without_group(inverse[:n, :n], groups):
        left_out[rows] = y[rows] - block @ alpha[rows]
    return alpha, both, -left_out[:n], -left_out[n:]


def known(x, groups, abnormal, query):
    """What known abnormal images add, for left-out normal images and for queries."""
    alpha, both, left, _ = ridge_contrast(x, groups, abnormal, torch.ones(len(abnormal), dtype=torch.double))
    score = -(torch.exp(-CONTRAST_WIDTH * squared_distances(query, both)) @ alpha)
    return [len(abnormal) / (len(abnormal) + HESITATION) * (z - 1).clamp_min(0) for z in standard(left, score)]


def q_values(p, share):
    m = len(p)
    order, q, lowest = p.argsort(stable=True), torch.empty(m, dtype=torch.double), 1.0
    for rank in range(m - 1, -1, -1):
        lowest = min(lowest, float(p[order[rank]]) * m * share / (rank + 1))
        q[order[rank]] = lowest
    return q


def together(x, groups, queries, left, score, expected=None):
    """p-values, share of normal images, weight and new scores of images that are scored together."""
    n, m = len(left), len(score)
    p = (1 + n - torch.searchsorted(left.sort().values, score.contiguous())).double() / (n + 1)
    share = min(1.0, float(2 * (p > 0.5).double().mean()) + 1 / m)
    noise = 2 * (1 / m + 1 / n) ** 0.5
    weight = min(1.0, max(0.0, (1 - share - noise) / 0.1)) if expected is None else 1.0
    q = q_values(p, share if expected is None else min(share, 1 - expected))
    kept = (1 - q > 0.02).nonzero().flatten()
    alpha, both, own, of_kept = ridge_contrast(x, groups, queries[kept], 1 - q[kept])
    z = -(torch.exp(-CONTRAST_WIDTH * squared_distances(queries, both)) @ alpha)
    z[kept] = of_kept
    return p, share, weight, score + weight * standard(own, z)[1]


def worst_patches(cores, owners, groups, x, q):
    """x, q: unit patch tokens of each block, [images, patches, channels]."""
    left, score = 0, 0
    for core, owner, bx, bq in zip(cores, owners, x, q):
        rows = []
        for i in range(len(bx)):
            s = bx[i] @ core.T
            s[:, owner == groups[i]] = -2
            rows.append((1 - s.amax(1)).topk(WORST).values.mean())
        left = left + torch.stack(rows)
        score = score + torch.stack([(1 - (p @ core.T).amax(1)).topk(WORST).values.mean() for p in bq])
    return left.double().log(), score.double().log()


def worst_with_faults(cores, owners, groups, x, q, faulty, marked):
    """As `worst_patches`, where known faulty patches lengthen the distances of patches like them; marked: of each image, or None."""
    left, score, hesitation = 0, 0, len(marked) / (len(marked) + HESITATION)
    for core, owner, bx, bq, bf in zip(cores, owners, x, q, faulty):
        core, bx, bq, bf = (block.double() for block in (core, bx, bq, bf))
        s = torch.stack([(1 - (p @ core.T)).amin(1) for p in bf])
        rows = torch.cat([f[d.topk(WORST).indices if m is None else torch.tensor(m, dtype=torch.long)] for f, d, m in zip(bf, s, marked)])
        both = torch.cat([core, rows])
        label = torch.cat([-torch.ones(len(core)), torch.ones(len(rows))]).double()
        weight = torch.cat([torch.full((len(core),), 0.5 / len(core)), torch.full((len(rows),), 0.5 / len(rows))]).double()
        centred = both - (weight[:, None] * both).sum(0)
        gram = (weight[:, None] * centred).T @ centred + FAULT_RIDGE * torch.eye(core.shape[1], dtype=torch.double)
        direction = torch.linalg.solve(gram, (weight[:, None] * centred).T @ label)
        normal = bx @ direction
        near = []
        for i in range(len(bx)):
            alike = bx[i] @ core.T
            alike[:, owner == groups[i]] = -1
            near.append(1 - alike.amax(1))
        near = torch.stack(near)
        step = hesitation * near.std(correction=0)
        more = lambda p: step * ((p @ direction - normal.mean()) / normal.std(correction=0) - 1).clamp_min(0)
        left = left + torch.stack([(d + more(p)).topk(WORST).values.mean() for d, p in zip(near, bx)])
        score = score + torch.stack([(1 - (p @ core.T).amax(1) + more(p)).topk(WORST).values.mean() for p in bq])
    return left.log(), score.log()


def object_values(places, normal, ordinary, weight):
    """weight log p_ordinary - log p_normal of unit rows, each density a mean of Gaussian kernels."""
    density = lambda known: torch.exp(-OBJECT_WIDTH * squared_distances(places.double(), known.double())).mean(1).log()
    return weight * density(ordinary) - density(normal)


def standard(left, score):
    return [(s - left.mean()) / left.std() for s in (left, score)]


def images(n, spread, gen, centre, copies=()):
    """n images of three parts around a centre, some of them followed by near copies."""
    x = centre + spread * torch.randn(n, centre.shape[0], generator=gen)
    rows = [x] + [x[i : i + 1] + 0.02 * spread * torch.randn(k, centre.shape[0], generator=gen) for i, k in copies]
    return [part.contiguous() for part in torch.cat(rows).float().split(8, 1)]


def build(name, spread, near, seed, out):
    gen = torch.Generator().manual_seed(seed)
    centre, other = torch.randn(2, 24, generator=gen)
    train = images(40, spread, gen, centre, copies=((3, 4), (17, 1), (31, 2)))
    test = [torch.cat(p) for p in zip(images(12, spread, gen, centre), images(12, 2 * spread, gen, other))]
    ordinary = [torch.cat(p) for p in zip(images(near, 1.2 * spread, gen, centre), images(300 - near, 2.5 * spread, gen, other))]
    x, q, b = (phi(parts, FIRST) for parts in (train, test, ordinary))
    # With parts that weigh the same, for everything but the posterior.
    plain_x, plain_q = phi(train), phi(test)
    chosen, groups = leaders(x)
    d = squared_distances(x[chosen], x[chosen]).fill_diagonal_(float("inf"))
    g = WIDTH / float(d.amin(1).median())
    left, score, of_background = posterior(x, groups, g, q, b)
    accepted = float((of_background < left.quantile(0.95)).double().mean())
    alike = float((plain_x[chosen] @ plain_x[chosen].T).fill_diagonal_(-2).topk(5).values.mean())
    weights = (2 * min(1.0, accepted / 0.02), 2 * min(1.0, max(0.0, (alike - 0.92) / 0.03)))
    flat = [phi(t[:2]) for t in (train, ordinary, test)]
    against = contrast(flat[0], groups, *flat[1:])
    tokens = lambda n: [unit(torch.randn(n, 10, 6, generator=gen)).float() for _ in range(2)]
    mx, mq = tokens(len(x)), tokens(len(q))
    keep = [torch.randperm(len(x) * 10, generator=gen)[:60] for _ in mx]
    cores = [block.reshape(-1, 6)[rows] for block, rows in zip(mx, keep)]
    owners = [groups[rows // 10] for rows in keep]
    worst = worst_patches(cores, owners, groups, mx, mq)
    pieces = [standard(left, score), standard(*against), standard(*worst)]
    total = [p + weights[0] * c + weights[1] * w for p, c, w in zip(*pieces)]
    # Without patches: known abnormal images, and a folder that is scored together, among the left-out values of leaders.
    plain = [p + weights[0] * c for p, c in zip(*pieces[:2])]
    first = torch.stack([(groups == group).nonzero()[0, 0] if int(chosen[group]) >= len(x) else chosen[group] for group in range(len(chosen))])
    abnormal = images(7, spread, gen, other)
    added = known(plain_x, groups, phi(abnormal), plain_q)
    folder = [torch.cat(p) for p in zip(images(50, spread, gen, centre), images(45, 2 * spread, gen, other))]
    f = phi(folder)
    scores = standard(left, posterior(x, groups, g, phi(folder, FIRST))[1])[1]
    scores = scores + weights[0] * standard(against[0], contrast(flat[0], groups, flat[1], phi(folder[:2]))[1])[1]
    p, share, weight, rescored = together(plain_x, groups, f, plain[0][first], scores)
    forced = together(plain_x, groups, f, plain[0][first], scores, 0.3)
    # Maps of objects: the first core set as places of normal images, in the sixth image and in a left-out one.
    places, elsewhere = mq[0][5], unit(torch.randn(30, 6, generator=gen)).float()
    others = cores[0][owners[0] != owners[0][0]]
    # Known faults, drawn last so that the rest keeps its bits.
    faulty, marked = tokens(5), [[2, 3], None, [7], [], [0, 1, 9]]
    faults = worst_with_faults(cores, owners, groups, mx, mq, faulty, marked)
    print(name, "together: share of normal images %.3f weight %.3f" % (share, weight))
    print(name, "groups", len(chosen), "width %.3f accepted %.4f alike %.4f weights" % (g, accepted, alike), weights)
    out.update({f"{name}.{k}": v.contiguous() for k, v in {
        **{f"train.{i}": part for i, part in enumerate(train)},
        **{f"test.{i}": part for i, part in enumerate(test)},
        **{f"ordinary.{i}": part for i, part in enumerate(ordinary)},
        **{f"patches.train.{i}": block for i, block in enumerate(mx)},
        **{f"patches.test.{i}": block for i, block in enumerate(mq)},
        **{f"core.{i}": core for i, core in enumerate(cores)},
        # Which image each patch of the core set is from.
        **{f"core.{i}.images": (rows // 10).to(torch.uint32) for i, rows in enumerate(keep)},
        "leaders": chosen.to(torch.uint32), "groups": groups.to(torch.uint32),
        "numbers": torch.tensor([g, accepted, alike, *weights], dtype=torch.double),
        "posterior.left_out": left, "posterior": score, "posterior.ordinary": of_background,
        "contrast.left_out": against[0], "contrast": against[1],
        "worst.left_out": worst[0], "worst": worst[1],
        **{f"patches.faulty.{i}": block for i, block in enumerate(faulty)},
        "faults.left_out": faults[0], "faults": faults[1],
        "sum.left_out": total[0], "sum": total[1],
        **{f"abnormal.{i}": part for i, part in enumerate(abnormal)},
        "known.left_out": added[0], "known": added[1],
        "plain": plain[1], "folder.scores": scores,
        **{f"folder.{i}": part for i, part in enumerate(folder)},
        "together.p": p, "together.numbers": torch.tensor([share, weight], dtype=torch.double),
        "objects.ordinary": elsewhere,
        **{f"objects.{w}": object_values(places, cores[0], elsewhere, w) for w in (0.0, 0.5, 1.0)},
        "objects.left_out": object_values(cores[0], others, elsewhere, 1.0),
        "together": rescored, "together.forced": forced[3],
    }.items()})


if __name__ == "__main__":
    golden = {}
    build("varied", 1.0, 6, 4, golden)
    build("alike", 0.32, 30, 1, golden)
    path = Path(__file__).parent.parent / "crates/defend-evidence/tests/golden/evidence.safetensors"
    save_file(golden, path)
    print(path, path.stat().st_size, "bytes")
