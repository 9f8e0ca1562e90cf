"""Batches drawn one by one and read several at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from embodied_rl.replay.damage import LostError
from embodied_rl.replay.gather import Draw

MOST = 8  # batches
ROOM = 2**20  # bytes of all of them


class Ahead:
    """Reads the next few batches at once, and hands out what one by one would have been the same.

    After an update the processor's caches hold nothing of this code: one batch takes three times
    as long as in a row with others. Whatever changes what may be drawn must `forget` first.

    Args:
        rng: that `draw` draws from; goes back to where the batches handed out have left it.
        draw: chooses the transitions of one batch of n.
        gather: reads the rows of a draw.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        draw: Callable[[int], Draw],
        gather: Callable[[Draw], dict[str, Tensor]],
    ) -> None:
        self._rng, self._draw, self._gather = rng, draw, gather
        self._rows: deque[dict[str, Tensor]] = deque()
        self._states: deque[Mapping[str, Any]] = deque()  # before each draw not handed out yet
        self._size = 0  # of the batches ahead
        self._count = 0  # handed out since the last `forget`
        self._bytes: int | None = None  # of a batch

    def __len__(self) -> int:
        return len(self._rows)

    def next(self, n: int) -> dict[str, Tensor]:
        """Returns the rows of the next batch of n.

        Raises:
            LostError: the next batch holds a lost trajectory; its draw is not undone.
            Exception: what else `draw` or `gather` raised; nothing was drawn then.
        """
        if n != self._size:
            self.forget(rewind=True)
            self._size = n
        if not self._rows:
            self._read(n)
        self._count += 1
        self._states.popleft()
        return self._rows.popleft()

    def forget(self, *, rewind: bool) -> None:
        """Drops what was read; `rewind` sets the generator back to before it was drawn."""
        if rewind and self._states:
            self._rng.bit_generator.state = self._states[0]
        self._rows.clear()
        self._states.clear()
        self._count = 0

    def _read(self, n: int) -> None:
        # as many as were used in a row so far: where trajectories come often, few are in vain
        fit = MOST if self._bytes is None else ROOM // max(self._bytes, 1)
        count = max(1, min(self._count, fit, MOST))
        try:
            rows = self._gather(self._several(n, count))
        except LostError:
            if count > 1:  # perhaps not the next one is concerned
                self.forget(rewind=True)
                self._read(n)
                return
            self._states.clear()  # as ever, a draw of what is lost is not undone
            raise
        except BaseException:
            self.forget(rewind=True)
            raise
        self._bytes = sum(v.numel() * v.element_size() for v in rows.values()) // count
        if count == 1:
            self._rows.append(rows)
            return
        parts = {name: value.unflatten(0, (count, n)).unbind(0) for name, value in rows.items()}
        self._rows.extend({name: part[i] for name, part in parts.items()} for i in range(count))

    def _several(self, n: int, count: int) -> Draw:
        draws = []
        for _ in range(count):
            self._states.append(self._rng.bit_generator.state)
            draws.append(self._draw(n))
        return joined(draws)


def joined(draws: list[Draw]) -> Draw:
    """Several draws as one."""
    if len(draws) == 1:
        return draws[0]
    return Draw(
        np.concatenate([draw.number for draw in draws]),
        np.concatenate([draw.offset for draw in draws]),
        np.concatenate([draw.left for draw in draws]),
        np.concatenate([draw.start for draw in draws]),
    )
