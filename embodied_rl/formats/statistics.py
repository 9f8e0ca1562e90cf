"""The statistics that LeRobot keeps beside its data: one table per feature.

Each holds `min`, `max`, `mean`, `std`, `count` and five quantiles. Those of a dataset are merged
from those of its episodes, exactly, except for the quantiles: they are the episodes' mean weighted
by length, which is LeRobot's own rule.
"""

from __future__ import annotations

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
Statistics = dict[str, np.ndarray]


def describe(values: np.ndarray) -> Statistics:
    """Statistics of a feature [N, ...] over its rows; [1] each for scalars [N]."""
    rows = values.astype(np.float64).reshape(len(values), *(values.shape[1:] or (1,)))
    found = {
        "min": rows.min(0),
        "max": rows.max(0),
        "mean": rows.mean(0),
        "std": rows.std(0),
        "count": np.array([len(rows)]),
    }
    return {**found, **{k: np.quantile(rows, q, 0) for k, q in QUANTILES.items()}}


def describe_images(images: np.ndarray) -> Statistics:
    """Statistics [3, 1, 1] of images, uint8 [N, height, width, 3], per channel, scaled to [0, 1].

    All pixels count, by way of a histogram.
    """
    counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)], 1)
    share = counts / counts.sum(0)  # [256, 3]
    level = np.arange(256)[:, None] / 255
    mean = (share * level).sum(0)
    below = share.cumsum(0)
    found = {
        "min": (counts > 0).argmax(0) / 255,
        "max": (255 - (counts[::-1] > 0).argmax(0)) / 255,
        "mean": mean,
        "std": np.sqrt((share * (level - mean) ** 2).sum(0)),
        **{k: (below >= q - 1e-12).argmax(0) / 255 for k, q in QUANTILES.items()},
    }
    shaped = {name: value.reshape(3, 1, 1) for name, value in found.items()}
    return {**shaped, "count": np.array([len(images)])}


def merge(a: Statistics | None, b: Statistics) -> Statistics:
    """Statistics of two pieces as one."""
    if a is None:
        return b
    count = a["count"] + b["count"]
    wa, wb = a["count"][0] / count[0], b["count"][0] / count[0]
    mean = wa * a["mean"] + wb * b["mean"]
    variance = wa * (a["std"] ** 2 + (a["mean"] - mean) ** 2) + wb * (
        b["std"] ** 2 + (b["mean"] - mean) ** 2
    )
    found = {
        "min": np.minimum(a["min"], b["min"]),
        "max": np.maximum(a["max"], b["max"]),
        "mean": mean,
        "std": np.sqrt(variance),
        "count": count,
    }
    return {**found, **{k: wa * a[k] + wb * b[k] for k in QUANTILES}}
