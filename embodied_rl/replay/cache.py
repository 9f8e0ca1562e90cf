"""Trajectories in memory as flat tensors, so that sampling a batch is one gather per field."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from embodied_rl.replay.column import Column

FIRST = 1024  # trajectories' worth of rows allocated at first
NOT_HELD = -1


class TrajectoryCache:
    """A ring of rows that holds whole trajectories; the oldest admitted leave first.

    Sampling is uniform, so each cached trajectory is worth as much as any other: the newest stay,
    and a miss is not admitted, which would cost reading a whole trajectory for a single row.

    Args:
        capacity: trajectories held at most.
        device: where the tensors live.
        max_bytes: bound on the tensors; None: no bound but `capacity`.
    """

    def __init__(self, capacity: int, device: torch.device, max_bytes: int | None = None) -> None:
        self.capacity, self.device, self.max_bytes = capacity, device, max_bytes
        self.fields: dict[str, Tensor] = {}
        self._spans: OrderedDict[int, tuple[int, int]] = OrderedDict()  # number -> [start, stop)
        self._start = Column()  # by trajectory number
        self._taken = np.zeros(0, np.bool_)  # by row
        self._rows = 0
        self._next = 0

    def __len__(self) -> int:
        return len(self._spans)

    @property
    def nbytes(self) -> int:
        """Bytes allocated (the system gives memory only to rows that were written)."""
        return sum(t.numel() * t.element_size() for t in self.fields.values())

    def starts(self, numbers: np.ndarray) -> np.ndarray:
        """First row of each trajectory, or -1 where it is not held."""
        while len(self._start) <= int(numbers.max(initial=-1)):
            self._start.append(NOT_HELD)
        return self._start.values[numbers]

    def admit(self, number: int, fields: Mapping[str, Tensor]) -> None:
        """Copies a trajectory's fields [T + 1, ...] in, evicting the oldest ones for room.

        One that is larger than the whole bound is not held.
        """
        while len(self._start) <= number:
            self._start.append(NOT_HELD)
        rows = len(next(iter(fields.values())))
        row_bytes = sum(v[0].numel() * v.element_size() for v in fields.values())
        limit = None if self.max_bytes is None else self.max_bytes // max(row_bytes, 1)
        if limit is not None and rows > limit:
            return
        while len(self._spans) >= self.capacity:
            self._drop_oldest()
        while not self._fits(rows):
            if limit is None or self._rows < limit:
                self._grow(fields, rows, limit)
            else:
                self._drop_oldest()
        start = self._place(rows)
        for name, value in fields.items():
            self.fields[name][start : start + rows] = value.to(self.device)
        self._spans[number] = (start, start + rows)
        self._taken[start : start + rows] = True
        self._start.values[number] = start
        self._next = start + rows

    def drop(self, number: int) -> None:
        """Forgets one trajectory, if it is held."""
        span = self._spans.pop(number, None)
        if span is not None:
            self._start.values[number] = NOT_HELD
            self._taken[span[0] : span[1]] = False

    def _drop_oldest(self) -> None:
        self.drop(next(iter(self._spans)))

    def _place(self, rows: int) -> int:
        return self._next if self._next + rows <= self._rows else 0

    def _fits(self, rows: int) -> bool:
        start = self._place(rows)
        return start + rows <= self._rows and not self._taken[start : start + rows].any()

    def _grow(self, fields: Mapping[str, Tensor], rows: int, limit: int | None) -> None:
        """Doubles the rows, within the limit."""
        used = max((b for _, b in self._spans.values()), default=0)
        total = max(min(self.capacity, FIRST) * rows, 2 * self._rows, used + rows)
        if limit is not None:
            total = min(total, limit)
        for name, value in fields.items():
            grown = torch.empty((total, *value.shape[1:]), dtype=value.dtype, device=self.device)
            if name in self.fields:
                grown[:used] = self.fields[name][:used]
            self.fields[name] = grown
        self._taken = np.concatenate([self._taken, np.zeros(total - self._rows, np.bool_)])
        self._rows, self._next = total, used
