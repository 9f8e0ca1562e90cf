"""Which transitions may be sampled: those of the newest trajectories."""

from __future__ import annotations

import numpy as np

from embodied_rl.replay.column import Column


class Window:
    """Uniform choice among the transitions of the newest `size` trajectories.

    Keeps running totals, so that neither adding nor drawing costs time in the number of
    trajectories (drawing: its logarithm).

    Args:
        size: trajectories in the window.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.first = 0  # trajectories below were evicted
        self._totals = Column([0])  # transitions before trajectory i

    def __len__(self) -> int:
        return len(self._totals) - 1

    @property
    def low(self) -> int:
        """Number of the oldest trajectory in the window."""
        return max(self.first, len(self) - self.size)

    @property
    def transitions(self) -> int:
        """Transitions to choose from."""
        return int(self._totals.values[-1] - self._totals.values[self.low])

    def append(self, length: int) -> None:
        """Counts a new trajectory of `length` decisions."""
        self._totals.append(int(self._totals.values[-1]) + length)

    def forget(self, number: int) -> None:
        """Takes the transitions of a lost trajectory out."""
        totals = self._totals.values
        totals[number + 1 :] -= totals[number + 1] - totals[number]

    def draw(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draws n transitions with replacement.

        Returns:
            Trajectory numbers, offsets, and decisions from each offset to its trajectory's end,
            int64 [n] each.
        """
        low = self.low
        totals = self._totals.values[low:]
        position = rng.integers(totals[0], totals[-1], size=n)
        which = totals.searchsorted(position, side="right") - 1
        return which + low, position - totals[which], totals[which + 1] - position
