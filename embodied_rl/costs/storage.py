"""Bytes of replay, by putting one made-up trajectory through the code that stores real ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from embodied_rl.config import AlgorithmConfig, ReplayBufferConfig
from embodied_rl.costs.draft import Draft
from embodied_rl.distributed import share_replay
from embodied_rl.replay.cache import FIRST, TrajectoryCache
from embodied_rl.replay.gather import TransitionReader
from embodied_rl.types import PREFIX, Features, Trajectory

ROWS = 2  # a decision and the observation after it


@dataclass
class Storage:
    """Replay of a run. A row is one decision; a trajectory has one row more than decisions.

    Attributes:
        observations: bytes of a row's observations.
        features: bytes of a row's stored features; 0 where none are stored.
        rest: bytes of its action, rewards and flags.
        cached: bytes that it takes in memory.
        cached_with_features: the same if features were stored, `policy.cache_features=true`.
        cached_with_images: the same if they were not.
        trajectory_rows: rows of a trajectory.
        trajectories: that the run makes.
        window_trajectories: of them, those that batches are drawn from.
        cache_rows: rows that each device's cache is allocated for, at the end of the run.
    """

    observations: int
    features: int
    rest: int
    cached: int
    cached_with_features: int
    cached_with_images: int
    trajectory_rows: int
    trajectories: int
    window_trajectories: int
    cache_rows: int

    @property
    def row(self) -> int:
        """Bytes of a row on disk, uncompressed."""
        return self.observations + self.features + self.rest

    @property
    def window_bytes(self) -> int:
        """Disk for the trajectories that batches are drawn from."""
        return self.window_trajectories * self.trajectory_rows * self.row

    @property
    def run_bytes(self) -> int:
        """Disk for everything that the run collects."""
        return self.trajectories * self.trajectory_rows * self.row

    @property
    def cache_bytes(self) -> int:
        """Memory of the cache."""
        return self.cache_rows * self.cached


def storage(draft: Draft, features: Features, max_episode_steps: int, devices: int = 1) -> Storage:
    """Computes it from one observation's features; `devices` share the trajectories evenly."""
    config, algorithm = draft.config, draft.config.algorithm
    plain, full = _fields(draft, None), _fields(draft, features)
    stored = full if config.policy.cache_features else plain
    sizes = {name: _bytes(value) // ROWS for name, value in stored.items()}
    seen = sum(size for name, size in sizes.items() if name.startswith("obs."))
    made = sum(size for name, size in sizes.items() if name.startswith(PREFIX))
    cached = _cached(stored, algorithm)
    execute = draft.policy.execute_steps
    episode = math.ceil(max_episode_steps / execute)  # decisions
    pieces = math.ceil(episode / config.rollout.max_trajectory_steps)
    rows = min(episode, config.rollout.max_trajectory_steps) + 1
    trajectories = math.ceil(config.train.total_steps / max_episode_steps) * pieces
    shard = share_replay(algorithm.replay_buffer, devices)
    return Storage(
        seen,
        made,
        sum(sizes.values()) - seen - made,
        cached,
        _cached(full, algorithm),
        _cached(plain, algorithm),
        rows,
        trajectories,
        min(trajectories, algorithm.replay_buffer.sample_window_size),
        _cache_rows(math.ceil(trajectories / devices), rows, cached, shard),
    )


def _fields(draft: Draft, features: Features | None) -> dict[str, Tensor]:
    """A trajectory as the collector makes it, of zeros."""
    assert draft.policy.actor is not None

    def zeros(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros((ROWS, *shape), dtype=dtype)

    fields = {f"obs.{k}": zeros(s.shape, s.dtype) for k, s in draft.sketch.spec.obs.items()}
    if features is not None:
        fields |= {k: zeros(tuple(v.shape[1:]), v.dtype) for k, v in features.tensors().items()}
    flags = dict.fromkeys(("terminated", "truncated", "success"), torch.bool)
    return {
        **fields,
        "action": zeros(draft.policy.actor.action_shape),
        "reward": zeros((draft.policy.execute_steps,)),
        "steps": zeros((), torch.int64),
        **{name: zeros((), dtype) for name, dtype in flags.items()},
    }


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _cached(fields: dict[str, Tensor], algorithm: AlgorithmConfig) -> int:
    """Bytes of a row in memory."""
    cache = TrajectoryCache(1, torch.device("cpu"))
    TransitionReader(None, cache, algorithm).admit(0, Trajectory(fields).fields)
    return cache.nbytes // ROWS


def _cache_rows(trajectories: int, rows: int, row_bytes: int, settings: ReplayBufferConfig) -> int:
    """Rows allocated by the end, as `TrajectoryCache` grows: it doubles."""
    if not settings.enable_cache:
        return 0
    wanted = min(trajectories, settings.cache_size) * rows
    total = min(settings.cache_size, FIRST) * rows
    while total < wanted:
        total *= 2
    if settings.cache_bytes is not None:
        total = min(total, settings.cache_bytes // row_bytes)
    return total
