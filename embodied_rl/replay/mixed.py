"""Batches with a fixed share of demonstrations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from embodied_rl.interfaces import ReplayBuffer
from embodied_rl.replay.buffer import TrajectoryReplay
from embodied_rl.types import Batch, Features, Obs, Trajectory


class MixedReplay(ReplayBuffer):
    """Batches with a fixed share of demonstrations (RLPD, Ball et al. 2023).

    Args:
        online: what the run collects; added to and checkpointed.
        demos: demonstrations.
        fraction: share of demonstrations in each batch.
    """

    def __init__(self, online: TrajectoryReplay, demos: TrajectoryReplay, fraction: float) -> None:
        self.online, self.demos, self.fraction = online, demos, fraction

    @property
    def problems(self) -> list[str]:
        """What the online store had to leave out so far."""
        return self.online.problems

    @property
    def ready(self) -> bool:
        """Whether both sources are."""
        return self.online.ready and self.demos.ready

    def add(self, trajectory: Trajectory) -> None:
        """Appends to the online buffer."""
        self.online.add(trajectory)

    def sample(self, n: int) -> Batch:
        """Returns n transitions, round(fraction * n) of them demonstrations."""
        from_demos = round(self.fraction * n)
        parts = [self.online.sample(n - from_demos)] if from_demos < n else []
        if from_demos:
            parts.append(self.demos.sample(from_demos))
        return concatenate(parts)

    def state_dict(self) -> dict[str, Any]:
        """Both generators and the online trajectories."""
        return {"online": self.online.state_dict(), "demos": self.demos.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores both."""
        self.online.load_state_dict(state["online"])
        self.demos.load_state_dict(state["demos"])

    def close(self) -> None:
        """Closes both."""
        self.online.close()
        self.demos.close()


def concatenate(batches: list[Batch]) -> Batch:
    """Joins batches along their rows."""

    def join(pick: Callable[[Batch], Tensor]) -> Tensor:
        return torch.cat([pick(b) for b in batches])

    return Batch(
        concatenate_features([b.features for b in batches]),
        concatenate_features([b.next_features for b in batches]),
        join(lambda b: b.action),
        join(lambda b: b.reward),
        join(lambda b: b.discount),
        join(lambda b: b.is_demo),
        _join_obs([b.obs for b in batches if b.obs is not None]),
    )


def concatenate_features(parts: list[Features]) -> Features:
    """Joins features along their rows, without context."""
    fields = [part.tensors() for part in parts]
    joined = Features.from_fields({k: torch.cat([f[k] for f in fields]) for k in fields[0]})
    assert joined is not None
    return joined


def _join_obs(parts: list[Obs]) -> Obs | None:
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]} if parts else None
