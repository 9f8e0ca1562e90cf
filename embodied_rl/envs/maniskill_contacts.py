"""How ManiSkill tells whether fingers hold something, for simulation on the CPU: the same, sooner.

As in `maniskill_poses`, equal bit for bit (tests/test_maniskill_poses.py). Only `maniskill.py` may
use this.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mani_skill.utils import common, sapien_utils

from embodied_rl.envs.maniskill_poses import Numbers, row_of

SHORT = 1e-6  # length below which a vector counts as zero
ONE = np.float32(1)

_angle = common.compute_angle_between


def install() -> None:
    """Puts them in the place of ManiSkill's own, which still serve everything but CPU tensors."""
    common.compute_angle_between = angle
    sapien_utils.compute_total_impulse = total_impulse


def angle(x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
    """Angles between vectors [N, 3], in radians; a right one to a vector of length zero."""
    first, second = row_of(x1, 3), row_of(x2, 3)
    if first is None or second is None or x1.ndim != 2 or x2.ndim != 2:
        return _angle(x1, x2)
    (a, b, c), (x, y, z) = _unit(x1, first), _unit(x2, second)
    cosine = np.minimum(np.maximum(a * x + b * y + c * z, -ONE), ONE)
    return torch.arccos(torch.from_numpy(np.array((cosine,), np.float32)))


def total_impulse(contacts: list[tuple[Any, bool]]) -> np.ndarray:
    """The sum [3] of what passed at all contacts' points; those not marked count as negative."""
    total = np.zeros(3)
    for contact, positive in contacts:
        impulses = [point.impulse for point in contact.points]
        for more in impulses[1:]:
            impulses[0] = impulses[0] + more
        if impulses:
            total += impulses[0] if positive else -impulses[0]
    return total


def _unit(vector: torch.Tensor, numbers: Numbers) -> Numbers:
    # the length by torch, whose sum of squares is rounded less often than numpy's
    length = np.float32(torch.linalg.norm(vector, dim=1).item())
    scale = ONE if length < SHORT else ONE / length
    return tuple(number * scale for number in numbers)
