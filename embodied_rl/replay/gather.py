"""Reading the rows of drawn transitions, from memory where they are held and else from disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied_rl.config import AlgorithmConfig
from embodied_rl.replay import returns
from embodied_rl.replay.cache import NOT_HELD, TrajectoryCache
from embodied_rl.replay.damage import LostError
from embodied_rl.replay.reader import StoreReader
from embodied_rl.types import PREFIX

HUGE = 4 * 2**20  # bytes from which numpy asks for huge pages
OUTCOME = "outcome"  # return and discount, side by side: one gather


@dataclass
class Draw:
    """Which transitions a batch is made of, all int64 [B].

    Attributes:
        number: trajectory.
        offset: decision in it.
        left: decisions from there to its end.
        start: first row of the trajectory in the cache, -1 where it is on disk only.
    """

    number: np.ndarray
    offset: np.ndarray
    left: np.ndarray
    start: np.ndarray


class TransitionReader:
    """Fields, returns and `next.<field>` of transitions.

    Args:
        store: trajectories on disk; None: they are in the cache only.
        cache: trajectories in memory; None: they are on disk only.
        config: gamma, n_step, bootstrap_type and the `replay_buffer` group.
    """

    def __init__(
        self, store: StoreReader | None, cache: TrajectoryCache | None, config: AlgorithmConfig
    ) -> None:
        self.store, self.cache, self.config = store, cache, config

    def locate(self, number: np.ndarray, offset: np.ndarray, left: np.ndarray) -> Draw:
        """Looks up which of the drawn transitions are in memory now."""
        if self.cache is None:
            return Draw(number, offset, left, np.full(len(number), NOT_HELD))
        return Draw(number, offset, left, self.cache.starts(number))

    def gather(self, draw: Draw) -> dict[str, Tensor]:
        """Reads a batch's rows: fields of the transitions, their returns, and `next.<field>`."""
        if self.cache is None:
            return self._stored(draw.number, draw.offset, draw.left)
        held = draw.start >= 0
        if held.all():
            return self._cached(draw.start + draw.offset)
        if not held.any():
            return self._stored(draw.number, draw.offset, draw.left)
        missed = self._stored(draw.number[~held], draw.offset[~held], draw.left[~held])
        rows = self._cached((draw.start + draw.offset)[held])
        miss, at = torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))
        out = {}
        for name, value in rows.items():
            out[name] = value.new_empty((len(held), *value.shape[1:]))
            out[name][at] = value
            out[name][miss] = missed[name].to(value.device)
        return out

    def _cached(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Transitions that start at the given rows of the cache: one gather per field."""
        assert self.cache is not None
        fields = self.cache.fields
        count = len(rows)
        both = torch.from_numpy(np.concatenate([rows, rows + 1])).to(self.cache.device)
        here = both[:count]
        if self.config.n_step > 1:  # else it is the next row
            both[count:] = here + fields["ahead"].index_select(0, here)
        # memory of their own, as from disk: compiled updates are made for one layout
        reward, discount = _take(fields[OUTCOME], here).t().contiguous().unbind(0)
        out = {"action": _take(fields["action"], here), "reward": reward, "discount": discount}
        for name in self._observation_names:
            value = _take(fields[name], both)
            out[name], out[f"next.{name}"] = value[:count], value[count:]
        return out

    def _stored(
        self, number: np.ndarray, offset: np.ndarray, left: np.ndarray
    ) -> dict[str, Tensor]:
        """The same from disk."""
        assert self.store is not None
        n, count = self.config.n_step, len(number)
        row = offset[:, None] + np.minimum(np.arange(n), left[:, None])
        window = self.store.gather(np.repeat(number, n), row.ravel(), returns.FIELDS)
        window = {name: value.unflatten(0, (count, n)) for name, value in window.items()}
        out = returns.n_step(window, torch.from_numpy(left), self.config)
        ahead = out.pop("ahead").numpy()
        names = self._observation_names
        out |= self.store.gather(number, offset, ["action", *names])
        after = self.store.gather(number, offset + ahead, names)
        return out | {f"next.{name}": value for name, value in after.items()}

    def admit(self, number: int, fields: Mapping[str, Tensor]) -> None:
        """Brings a trajectory into memory; returns take the place of what makes them."""
        if self.cache is not None:
            made = returns.of_trajectory(fields, self.config)
            kept = _sampled_fields(fields)
            for name in returns.FIELDS:
                del kept[name]
            kept[OUTCOME] = torch.stack([made["reward"], made["discount"]], 1)
            if self.config.n_step > 1:
                kept["ahead"] = made["ahead"]
            self.cache.admit(number, kept)

    def fill(self) -> None:
        """Brings the newest trajectories of the store into memory."""
        if self.store is None or self.cache is None:
            return
        for number in self._newest(self.store):
            try:
                rows = np.arange(self.store.length(number) + 1)
                names = list(_sampled_fields(dict.fromkeys(self.store.field_names)))
                self.admit(number, self.store.gather(np.full(len(rows), number), rows, names))
            except LostError:
                continue  # it is among the problems now

    def _newest(self, store: StoreReader) -> list[int]:
        """Trajectories that the cache will hold, oldest first."""
        settings, chosen, used = self.config.replay_buffer, [], 0
        bound = settings.cache_bytes
        for number in range(len(store) - 1, store.first - 1, -1):
            if len(chosen) == min(settings.cache_size, settings.sample_window_size):
                break
            if store.length(number):
                names = list(_sampled_fields(dict.fromkeys(store.field_names)))
                used += store.row_bytes(number, names) * (store.length(number) + 1)
                if bound is not None and used > bound:
                    break
                chosen.append(number)
        return chosen[::-1]

    @property
    def _observation_names(self) -> list[str]:
        if self.cache is not None and self.cache.fields:
            known = self.cache.fields
        else:
            assert self.store is not None
            known = self.store.field_names
        return _observed(known)


def _take(field: Tensor, rows: Tensor) -> Tensor:
    """`index_select` along the first axis.

    A large result on the CPU goes into memory that numpy allocates: it asks the system for huge
    pages, without which most of the time is spent on page faults (5x at 12 MB).
    """
    size = len(rows) * field.stride(0) * field.element_size()  # rows are contiguous
    if field.device.type != "cpu" or size < HUGE:
        return field.index_select(0, rows)
    out = torch.from_numpy(np.empty(size, np.uint8)).view(field.dtype)
    out = out.view(len(rows), *field.shape[1:])
    return torch.index_select(field, 0, rows, out=out)


def _sampled_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields that sampling reads: observations only where there are no features."""
    return {name: fields[name] for name in ("action", *returns.FIELDS, *_observed(fields))}


def _observed(names: Iterable[str]) -> list[str]:
    names = list(names)
    features = [name for name in names if name.startswith(PREFIX)]
    return features or [name for name in names if name.startswith("obs.")]
