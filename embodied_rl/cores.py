"""How simulators and updates share a machine's cores."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

from embodied_rl.config import Config

MOST = 4  # threads: more do little for networks a few hundred units wide
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds used, in a period of so many


def usable_cores() -> int:
    """Cores that this process may run on, or fewer where a container's quota is below that."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(allowed(0)) if allowed is not None else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text(encoding="ascii").split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # none, or "max"
        return cores


def settle(config: Config, device: str, processes: int = 1, cores: int | None = None) -> Config:
    """Fills in `train.threads` and `rollout.overlap` where they are null.

    Several simulators keep a core each busy, so updates get those that are left. One has little to
    do between two updates, which then get all of them. Where simulators leave none, and updates
    are as many as their steps, both take turns with all cores: an update takes longer than a step,
    and a second thread saves more than simulating meanwhile (docs/performance.md).

    Args:
        config: of the whole run.
        device: type of the learner's device, "cpu" or "cuda".
        processes: of the run on this machine; they share its cores and simulators.
        cores: of this machine; None: those that this process may use.

    Returns:
        A copy without a null there.
    """
    threads, overlap, rollout = config.train.threads, config.rollout.overlap, config.rollout
    own = (usable_cores() if cores is None else cores) // processes
    simulators = math.ceil(config.env.num_envs / processes)
    alone = simulators == 1 and not rollout.asynchronous
    free = own if alone else own - simulators
    if overlap is None:
        steps = config.env.num_envs * rollout.steps
        busy = free < 1 < own and config.algorithm.update_epoch >= steps
        apart = device == "cpu" and threads is None and not rollout.asynchronous
        overlap = not (busy and apart)
    if threads is None:
        threads = max(1, min(MOST, free if overlap else own)) if device == "cpu" else 1
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, threads=threads),
        rollout=dataclasses.replace(rollout, overlap=overlap),
    )
