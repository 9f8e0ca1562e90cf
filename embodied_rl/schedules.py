"""Scalar schedules over environment steps or updates."""

from __future__ import annotations

import math


def linear(start: float, end: float, steps: int, t: int) -> float:
    """Goes from `start` to `end` over `steps`, then stays; `steps` 0 means `end` at once."""
    if steps <= 0 or t >= steps:
        return end
    return start + (end - start) * t / steps


def learning_rate(kind: str, start: float, end: float, progress: float) -> float:
    """Learning rate at `progress` in [0, 1] of a run.

    Args:
        kind: torch_constant | linear | cosine.
        start: rate at progress 0.
        end: rate at progress 1.
        progress: share of the run that is over.

    Raises:
        ValueError: an unknown kind.
    """
    progress = min(max(progress, 0.0), 1.0)
    if kind == "torch_constant":
        return start
    if kind == "linear":
        return start + (end - start) * progress
    if kind == "cosine":
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
    raise ValueError(f"lr_scheduler={kind!r}; allowed: torch_constant, linear, cosine")
