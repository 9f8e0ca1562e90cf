"""n-step returns of action chunks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from embodied_rl.config import AlgorithmConfig

FIELDS = ("reward", "steps", "terminated")  # what a return is made of


def n_step(rows: Mapping[str, Tensor], left: Tensor, config: AlgorithmConfig) -> dict[str, Tensor]:
    """Discounted rewards and the discount of what follows them.

    Sums over the first n decisions, fewer where the trajectory ends or the task terminates. A
    chunk's own rewards are discounted step by step: R = sum_i gamma^i r_i, and the discount is
    gamma to the number of environment steps (Sutton, Precup & Singh 1999, on options).

    Args:
        rows: `reward` [B, n, H], `steps` [B, n] and `terminated` [B, n] of n decisions in a row;
            what lies behind the end of a trajectory has no effect.
        left: [B] decisions from the first one to the end of its trajectory.
        config: gamma, n_step and bootstrap_type.

    Returns:
        `reward` [B], `discount` [B] (zero where nothing follows) and `ahead` [B] int32, decisions
        from the first one to the observation that is bootstrapped from.
    """
    ends = rows["terminated"].to(torch.int64)
    position = torch.arange(config.n_step, device=left.device)
    used = (position < left[:, None]) & (ends.cumsum(1) - ends == 0)
    steps = torch.where(used, rows["steps"], 0)
    before = steps.cumsum(1) - steps
    reward = rows["reward"]
    gamma = torch.tensor(config.gamma, dtype=reward.dtype, device=reward.device)
    chunk = (reward * gamma ** torch.arange(reward.shape[2], device=reward.device)).sum(2)
    discount = gamma ** steps.sum(1)
    if config.bootstrap_type == "standard":
        discount = discount * ~(used & rows["terminated"]).any(1)
    return {
        "reward": torch.where(used, gamma**before * chunk, 0.0).sum(1),
        "discount": discount,
        "ahead": used.sum(1, dtype=torch.int32),
    }


def of_trajectory(fields: Mapping[str, Tensor], config: AlgorithmConfig) -> dict[str, Tensor]:
    """`n_step` for each row of a trajectory whose fields have T + 1 rows."""
    count = len(fields["steps"])
    row = torch.arange(count)
    window = (row[:, None] + torch.arange(config.n_step)).clamp(max=count - 1)
    return n_step({name: fields[name][window] for name in FIELDS}, count - 1 - row, config)
