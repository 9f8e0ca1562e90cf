"""Which collector a run has: one in its own process, or one that speaks for another process."""

from __future__ import annotations

from collections.abc import Callable

import torch

from embodied_rl.collecting_process import CollectingProcess
from embodied_rl.collector import Collector
from embodied_rl.config import Config
from embodied_rl.distributed import Ranks
from embodied_rl.guard import Guard
from embodied_rl.interfaces import ReplayBuffer, VecEnv
from embodied_rl.policy import Policy
from embodied_rl.remote_collector import RemoteCollector


def build_collector(
    config: Config,
    env: VecEnv | CollectingProcess,
    policy: Policy,
    replay: ReplayBuffer,
    device: torch.device,
    seed: int,
    *,
    guard: Guard,
    ranks: Ranks,
    updates: Callable[[], int],
    saves: Callable[[int], bool],
) -> Collector | RemoteCollector:
    """Builds what steps the training environments, or what speaks for the process that does.

    Args:
        config: the run's, or one process's share of it.
        env: training environments, or the process that has them.
        policy: what acts.
        replay: where finished trajectories go.
        device: where the policy lives.
        seed: of the training episodes.
        guard: checks what comes from the environments.
        ranks: processes that train together.
        updates: returns the number of updates so far.
        saves: whether a checkpoint follows the iteration that ends at a step.
    """
    if isinstance(env, CollectingProcess):
        return RemoteCollector(env, policy, replay, config, ranks, updates=updates, saves=saves)
    if config.rollout.asynchronous:
        raise ValueError("rollout.asynchronous=true wants a CollectingProcess, not its VecEnv")
    return Collector(
        env,
        policy,
        replay,
        config.rollout,
        guard,
        store_features=config.policy.cache_features,
        seed=seed,
        device=device,
        ranks=ranks,
    )
