"""Trajectories in memory as flat tensors, so that sampling a batch is one gather per field."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from embodied_rl.types import Trajectory


class TrajectoryCache:
    """A ring of rows that holds whole trajectories; the oldest admitted leave first.

    Args:
        capacity: trajectories held at most.
        device: where the tensors live.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self.fields: dict[str, Tensor] = {}
        self._spans: OrderedDict[int, tuple[int, int]] = OrderedDict()  # number -> [start, stop)
        self._rows = 0
        self._next = 0

    def __len__(self) -> int:
        return len(self._spans)

    def start(self, number: int) -> int:
        """First row of a trajectory, or -1 if it is not held."""
        span = self._spans.get(number)
        return -1 if span is None else span[0]

    def admit(self, number: int, trajectory: Trajectory) -> None:
        """Copies a trajectory in, evicting the oldest ones for room."""
        rows = trajectory.length + 1
        while len(self._spans) >= self.capacity:
            self._spans.popitem(last=False)
        if rows > self._rows or self._would_evict(rows):
            self._grow(trajectory, rows)
        if self._next + rows > self._rows:
            self._next = 0
        span = (self._next, self._next + rows)
        for name, value in trajectory.fields.items():
            self.fields[name][span[0] : span[1]] = value.to(self.device)
        self._spans[number] = span
        self._next = span[1]

    def _would_evict(self, rows: int) -> bool:
        start = self._next if self._next + rows <= self._rows else 0
        return any(a < start + rows and b > start for a, b in self._spans.values())

    def _grow(self, trajectory: Trajectory, rows: int) -> None:
        """Doubles the rows (memory is touched only where it is written)."""
        used = max((b for _, b in self._spans.values()), default=0)
        first = min(self.capacity, 1024) * rows
        total = max(first, 2 * self._rows, used + rows)
        for name, value in trajectory.fields.items():
            grown = torch.empty((total, *value.shape[1:]), dtype=value.dtype, device=self.device)
            if name in self.fields:
                grown[:used] = self.fields[name][:used]
            self.fields[name] = grown
        self._rows, self._next = total, used
