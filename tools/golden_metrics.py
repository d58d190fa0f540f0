"""Golden values of defend-metrics: scikit-learn for the figures, NumPy for DeLong and PRO.

Usage: python tools/golden_metrics.py   (needs numpy, scipy, scikit-learn)
Writes crates/defend-metrics/tests/golden/metrics.json.
"""

import json
from pathlib import Path

import numpy as np
from scipy.ndimage import label
from scipy.stats import norm
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

OUT = Path(__file__).parent.parent / "crates/defend-metrics/tests/golden/metrics.json"


def delong(scores, abnormal, confidence):
    """DeLong's variance straight from its definition over all pairs, interval on the logit scale."""
    x, y = scores[abnormal], scores[~abnormal]
    psi = (x[:, None] > y[None]) + 0.5 * (x[:, None] == y[None])
    a = psi.mean()
    variance = psi.mean(1).var(ddof=1) / len(x) + psi.mean(0).var(ddof=1) / len(y)
    spread = norm.ppf((1 + confidence) / 2) * np.sqrt(variance) / (a * (1 - a))
    centre = np.log(a / (1 - a))
    return [float(1 / (1 + np.exp(-v))) for v in (centre - spread, centre + spread)]


def figures(scores, abnormal):
    fpr, tpr, _ = roc_curve(abnormal, scores, drop_intermediate=False)
    precision, recall, _ = precision_recall_curve(abnormal, scores)
    with np.errstate(invalid="ignore"):
        f1 = np.nan_to_num(2 * precision * recall / (precision + recall))
    return {
        "scores": scores.tolist(),
        "abnormal": abnormal.tolist(),
        "auroc": roc_auc_score(abnormal, scores),
        "average_precision": average_precision_score(abnormal, scores),
        "fpr_at_95": float(fpr[tpr >= 0.95].min()),
        "f1_max": float(f1.max()),
        "delong_95": delong(scores, abnormal, 0.95),
    }


def pro(maps, masks, limit):
    """Every threshold in turn, regions by SciPy's labelling."""
    regions = []
    for i, mask in enumerate(masks):
        labels, n = label(mask, np.ones((3, 3)))
        regions += [(i, labels == k + 1) for k in range(n)]
    points = [(0.0, 0.0)]
    for t in np.unique(maps)[::-1]:
        hot = maps >= t
        overlap = np.mean([hot[i][r].mean() for i, r in regions])
        points.append((hot[~masks].mean(), overlap))
    fpr, overlap = np.array(points).T
    keep = fpr < limit
    x = np.append(fpr[keep], limit)
    y = np.append(overlap[keep], np.interp(limit, fpr, overlap))
    return float(np.trapezoid(y, x) / limit)


def main():
    rng = np.random.default_rng(0)
    cases = []
    for n, share, decimals in [(40, 0.5, 1), (60, 0.1, 2), (60, 0.9, 2), (80, 0.3, 6)]:
        abnormal = rng.random(n) < share
        cases.append(figures(np.round(rng.normal(size=n) + abnormal, decimals), abnormal))
    masks = rng.random((3, 10, 12)) < 0.12
    maps = np.round(rng.normal(size=masks.shape) + 1.5 * masks, 1)
    golden = {
        "cases": cases,
        "pro": {
            "maps": maps.tolist(),
            "masks": masks.tolist(),
            "at_0.3": pro(maps, masks, 0.3),
            "at_1": pro(maps, masks, 1.0),
        },
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
