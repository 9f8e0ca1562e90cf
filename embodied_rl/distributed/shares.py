"""What of a run each of several processes does."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np

from embodied_rl.config import Config, ReplayBufferConfig
from embodied_rl.distributed.ranks import Ranks
from embodied_rl.errors import UserError

REPLAY_SIZES = (
    "cache_size",
    "sample_window_size",
    "min_buffer_size",
    "cache_bytes",
    "max_bytes",
)


def share(config: Config, ranks: Ranks) -> Config:
    """One process's part of the run: its environments, rows of the batch, replay, and seed.

    Raises:
        UserError: the processes cannot share them equally.
    """
    if ranks.world == 1:
        return config
    part = copy.deepcopy(config)
    for section, key, least in (
        ("env", "num_envs", 1),
        ("eval", "num_envs", 1),
        ("algorithm", "batch_size", 2),
    ):
        owner = getattr(part, section)
        whole = getattr(owner, key)
        if whole % ranks.world or whole // ranks.world < least:
            raise UserError(
                f"{section}.{key}={whole} cannot be shared by {ranks.world} processes. It is that "
                f"of the whole run: set a multiple of {ranks.world * least}."
            )
        setattr(owner, key, whole // ranks.world)
    demo, rows = part.algorithm.demo, part.algorithm.batch_size
    shown = round(demo.fraction * config.algorithm.batch_size)
    before, after = (shown * r // ranks.world for r in (ranks.rank, ranks.rank + 1))
    demo.fraction = (after - before) / rows  # each rounding its own would add up to another number
    part.algorithm.replay_buffer = share_replay(part.algorithm.replay_buffer, ranks.world)
    words = np.random.SeedSequence([config.seed, ranks.world, ranks.rank]).generate_state(1)
    part.seed = int(words[0])
    return part


def share_replay(settings: ReplayBufferConfig, world: int) -> ReplayBufferConfig:
    """The settings of one shard of `world`; sizes are rounded up, so that none is 0."""
    whole = {key: getattr(settings, key) for key in REPLAY_SIZES}
    return dataclasses.replace(
        settings, **{key: -(-size // world) for key, size in whole.items() if size is not None}
    )
