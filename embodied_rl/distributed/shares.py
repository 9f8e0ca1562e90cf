"""What of a run each of several processes does."""

from __future__ import annotations

import copy

import numpy as np

from embodied_rl.config import Config
from embodied_rl.distributed.ranks import Ranks
from embodied_rl.errors import UserError


def share(config: Config, ranks: Ranks) -> Config:
    """One process's part of the run: its environments, its rows of the batch, its own seed.

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
    words = np.random.SeedSequence([config.seed, ranks.world, ranks.rank]).generate_state(1)
    part.seed = int(words[0])
    return part
