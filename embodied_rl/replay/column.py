"""A column of integers that grows at its end without being copied each time."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class Column:
    """Append-only int64 values with a numpy view of them.

    Args:
        values: the first ones.
    """

    def __init__(self, values: Iterable[int] = ()) -> None:
        self._store = np.fromiter(values, np.int64)
        self._size = len(self._store)

    def __len__(self) -> int:
        return self._size

    @property
    def values(self) -> np.ndarray:
        """All values, int64 [len]; writing to the view writes to the column."""
        return self._store[: self._size]

    def append(self, value: int) -> None:
        """Adds one value."""
        if self._size == len(self._store):
            grown = np.empty(max(64, 2 * self._size), np.int64)
            grown[: self._size] = self._store
            self._store = grown
        self._store[self._size] = value
        self._size += 1

    def truncate(self, size: int) -> None:
        """Forgets the values from position `size` on."""
        self._size = min(size, self._size)
