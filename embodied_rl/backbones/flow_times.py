"""The times at which a flow policy is trained."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_times(
    count: int,
    generator: torch.Generator | None,
    alpha: float = 1.5,
    scale: float = 0.999,
    offset: float = 0.001,
) -> Tensor:
    """Draws flow times [B] as π0 and SmolVLA are trained with: Beta(alpha, 1), scaled into (0, 1).

    The distribution function of Beta(a, 1) is t^a, so t is a uniform number to the power 1 / a.
    Noise (time 1) is drawn more often than actions (time 0).

    Args:
        count: B.
        generator: draws, on the CPU; None: torch's default one.
        alpha: first parameter of the distribution.
        scale: of what it gives.
        offset: added to that.
    """
    return torch.rand(count, generator=generator) ** (1 / alpha) * scale + offset
