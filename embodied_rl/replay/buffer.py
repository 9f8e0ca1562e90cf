"""Sampling transitions from trajectories: windows, returns, and the share of demonstrations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied_rl.config import AlgorithmConfig
from embodied_rl.errors import ReplayNotReady
from embodied_rl.interfaces import ReplayBuffer
from embodied_rl.replay.cache import TrajectoryCache
from embodied_rl.replay.store import TrajectoryStore
from embodied_rl.types import Batch, Features, Obs, Trajectory

VECTOR, BASE = "features.vector", "features.base_action"


class TrajectoryReplay(ReplayBuffer):
    """Uniform over the transitions of the newest `sample_window_size` trajectories.

    Args:
        store: where trajectories are kept; None keeps them in the cache only.
        config: gamma, n_step, bootstrap_type and the `replay_buffer` group.
        encode: backbone forward for trajectories that carry no features.
        device: where batches are built.
        seed: of this buffer's own generator.
        is_demo: marks the batch rows.
    """

    def __init__(
        self,
        store: TrajectoryStore | None,
        config: AlgorithmConfig,
        encode: Callable[[Obs], Features],
        device: torch.device,
        seed: int,
        is_demo: bool = False,
    ) -> None:
        settings = config.replay_buffer
        self.store, self.config, self.device = store, config, device
        self.window, self.minimum = settings.sample_window_size, settings.min_buffer_size
        self.is_demo = is_demo
        self._encode = encode
        self._rng = np.random.default_rng(seed)
        in_memory = settings.enable_cache or store is None
        self._cache = TrajectoryCache(settings.cache_size, device) if in_memory else None
        self._lengths: list[int] = []
        self._cumulative = np.zeros(0, np.int64)
        self._starts = np.zeros(0, np.int64)
        if store is not None:
            self._load_existing()

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def problems(self) -> list[str]:
        """What the store had to leave out when it was opened."""
        return self.store.problems if self.store is not None else []

    @property
    def transitions(self) -> int:
        """Transitions that `sample` chooses from."""
        return int(self._cumulative[-1]) if len(self._cumulative) else 0

    @property
    def ready(self) -> bool:
        """Whether `min_buffer_size` trajectories are there."""
        return len(self) >= self.minimum and self.transitions > 0

    def add(self, trajectory: Trajectory) -> None:
        """Appends a trajectory to disk and cache."""
        number = len(self._lengths)
        if self.store is not None:
            self.store.append(trajectory)
        self._lengths.append(trajectory.length)
        if self._cache is not None:
            self._cache.admit(number, trajectory)
        self._refresh_window()

    def sample(self, n: int) -> Batch:
        """Returns exactly n transitions, with replacement, from this buffer's own generator.

        Raises:
            ReplayNotReady: fewer than `min_buffer_size` trajectories.
        """
        if not self.ready:
            raise ReplayNotReady(
                f"{len(self)} trajectories of the {self.minimum} that "
                "algorithm.replay_buffer.min_buffer_size asks for"
            )
        position = self._rng.integers(self.transitions, size=n)
        which = np.searchsorted(self._cumulative, position, side="right")
        first = len(self._lengths) - len(self._cumulative)
        lengths = np.asarray(self._lengths[first:])[which]
        offset = position - (self._cumulative[which] - lengths)
        return self._build(which + first, self._starts[which], offset, lengths - offset)

    def _build(
        self, number: np.ndarray, start: np.ndarray, offset: np.ndarray, left: np.ndarray
    ) -> Batch:
        """Builds a batch from trajectory numbers, cache rows (-1: on disk) and offsets.

        `left` counts the decisions from each offset to its trajectory's end.
        """
        config = self.config
        rows = Rows(self, number, start, offset)
        names = ["reward", "steps", "terminated"]
        here = rows.read(["action", *names, *self._observation_names()], 0)
        reward, steps, terminated = (here[k] for k in names)
        reward, steps = _discounted(reward, config.gamma), steps.to(torch.float32)
        used = np.ones(len(number), np.int64)
        for k in range(1, config.n_step):
            more = (left > k) & ~terminated.cpu().numpy()
            if not more.any():
                break
            mask = torch.from_numpy(more).to(self.device)
            following = rows.read(names, np.where(more, k, 0))
            gain = _discounted(following["reward"], config.gamma)
            reward = reward + torch.where(mask, config.gamma**steps * gain, 0.0)
            steps = steps + torch.where(mask, following["steps"].to(torch.float32), 0.0)
            terminated = terminated | (mask & following["terminated"])
            used += more
        discount = config.gamma**steps
        if config.bootstrap_type == "standard":
            discount = discount * ~terminated
        after = rows.read(self._observation_names(), used)
        demo = torch.full((len(number),), self.is_demo, device=self.device)
        return Batch(
            self._features(here), self._features(after), here["action"], reward, discount, demo
        )

    def _observation_names(self) -> list[str]:
        if VECTOR in self._field_names:
            return [VECTOR, BASE]
        return [name for name in self._field_names if name.startswith("obs.")]

    def _features(self, fields: dict[str, Tensor]) -> Features:
        if VECTOR in fields:
            return Features(fields[VECTOR], fields[BASE])
        return self._encode({k.removeprefix("obs."): fields[k] for k in self._observation_names()})

    @property
    def _field_names(self) -> list[str]:
        if self._cache is not None:
            return list(self._cache.fields)
        assert self.store is not None
        held = next(i for i, length in enumerate(self._lengths) if length)
        return list(self.store.read_rows(held, 0, 0))

    def _refresh_window(self) -> None:
        newest = np.asarray(self._lengths[-self.window :], np.int64)
        self._cumulative = np.cumsum(newest)
        first = len(self._lengths) - len(newest)
        cache = self._cache
        held = [-1 if cache is None else cache.start(first + i) for i in range(len(newest))]
        self._starts = np.asarray(held, np.int64)

    def _load_existing(self) -> None:
        assert self.store is not None
        total = len(self.store)
        self._lengths = [self.store.length(i) for i in range(total)]
        if self._cache is not None:
            for number in range(max(0, total - self._cache.capacity), total):
                if self._lengths[number]:
                    self._cache.admit(number, Trajectory(self.store.read(number)))
        self._refresh_window()

    def state_dict(self) -> dict[str, Any]:
        """The generator, and how many trajectories the disk holds by now."""
        if self.store is not None:
            self.store.flush()
        return {"rng": self._rng.bit_generator.state, "trajectories": len(self._lengths)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to the trajectories and the generator of a checkpoint."""
        if self.store is not None:
            self.store.truncate(state["trajectories"])
            if self._cache is not None:
                self._cache = TrajectoryCache(self._cache.capacity, self.device)
            self._load_existing()
        self._rng.bit_generator.state = state["rng"]


class Rows:
    """The rows of one batch: gathered from the cache, or read through the memory map."""

    def __init__(
        self, replay: TrajectoryReplay, number: np.ndarray, start: np.ndarray, offset: np.ndarray
    ) -> None:
        self._replay, self._number, self._offset = replay, number, offset
        self._cached = bool((start >= 0).all())
        self._rows = start + offset
        self._start = start

    def read(self, names: list[str], ahead: int | np.ndarray) -> dict[str, Tensor]:
        """Returns fields `ahead` decisions after each sampled one, [B, ...]."""
        cache, device = self._replay._cache, self._replay.device
        if self._cached and cache is not None:
            index = torch.from_numpy(self._rows + ahead).to(device)
            return {name: cache.fields[name].index_select(0, index) for name in names}
        offsets = self._offset + ahead
        parts = [self._read_one(i, int(at), names) for i, at in enumerate(offsets)]
        return {name: torch.cat([p[name] for p in parts]) for name in names}

    def _read_one(self, i: int, offset: int, names: list[str]) -> dict[str, Tensor]:
        cache, store = self._replay._cache, self._replay.store
        if cache is not None and self._start[i] >= 0:
            row = int(self._start[i]) + offset
            return {name: cache.fields[name][row : row + 1] for name in names}
        assert store is not None
        rows = store.read_rows(int(self._number[i]), offset, offset + 1, names)
        return {name: value.to(self._replay.device) for name, value in rows.items()}


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
        """What the online store had to leave out when it was opened."""
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
        return concatenate([self.online.sample(n - from_demos), self.demos.sample(from_demos)])

    def state_dict(self) -> dict[str, Any]:
        """Both generators and the online trajectories."""
        return {"online": self.online.state_dict(), "demos": self.demos.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores both."""
        self.online.load_state_dict(state["online"])
        self.demos.load_state_dict(state["demos"])


def concatenate(batches: list[Batch]) -> Batch:
    """Joins batches along their rows."""

    def join(pick: Callable[[Batch], Tensor]) -> Tensor:
        return torch.cat([pick(b) for b in batches])

    return Batch(
        Features(join(lambda b: b.features.vector), join(lambda b: b.features.base_action)),
        Features(
            join(lambda b: b.next_features.vector), join(lambda b: b.next_features.base_action)
        ),
        join(lambda b: b.action),
        join(lambda b: b.reward),
        join(lambda b: b.discount),
        join(lambda b: b.is_demo),
    )


def _discounted(rewards: Tensor, gamma: float) -> Tensor:
    """Sum of gamma^i r_i over the steps of each chunk: [B, h] to [B]."""
    if rewards.shape[1] == 1:
        return rewards[:, 0]
    powers = gamma ** torch.arange(rewards.shape[1], device=rewards.device, dtype=rewards.dtype)
    return rewards @ powers
