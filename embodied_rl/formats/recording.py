"""Trajectories on their way from one format to another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from embodied_rl.errors import UserError
from embodied_rl.types import Trajectory


@dataclass
class Recording:
    """Trajectories and what they share.

    Attributes:
        trajectories: read one at a time; an iterator can be used once.
        meta: JSON values that all of them share (task, fingerprint of the backbone).
        notes: what was left out or guessed, one line each; complete once all were read.
    """

    trajectories: Iterable[Trajectory]
    meta: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def same(a: Tensor | None, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes (so a NaN equals itself)."""
    return (
        a is not None
        and a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
    )


def check_single_steps(trajectory: Trajectory, where: str) -> None:
    """Raises UserError where a decision executed more than one action.

    Other formats hold one observation per action; a chunk has one observation for all of its own.
    """
    steps = trajectory.fields["steps"][:-1]
    if trajectory.fields["reward"].shape[1] != 1 or bool((steps != 1).any()):
        raise UserError(
            f"{where}: its decisions execute up to {int(steps.max())} actions each. ManiSkill and "
            "LeRobot files hold one observation per action, so only decisions of one action can "
            "be exported. Collect with rollout.execute_steps=1."
        )
