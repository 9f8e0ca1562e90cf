"""`python -m embodied_rl.demos`: collects demonstrations from scripted experts or a policy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from embodied_rl import builders, cli
from embodied_rl.command_configs import DemosConfig
from embodied_rl.errors import UserError
from embodied_rl.interfaces import VecEnv
from embodied_rl.load_config import load_config
from embodied_rl.policy import Policy
from embodied_rl.replay.store import TrajectoryStore
from embodied_rl.teachers import PolicyTeacher, ScriptedTeacher, Teacher
from embodied_rl.types import EXPERT, INSTRUCTION, Trajectory
from embodied_rl.validate import validate


def main(args: list[str]) -> int:
    """Writes a demonstration folder; returns 0."""
    config, given = load_config(DemosConfig, args)
    torch.set_num_threads(config.threads)
    policy = None
    teacher: Teacher = ScriptedTeacher()
    if config.policy is not None:
        device = builders.build_device(config.device)
        policy = Policy.from_pretrained(config.policy).to(device)
        cli.adopt_env(config.env, policy.env, given)
        validate(config)
        teacher = PolicyTeacher(policy, device, config.seed, deterministic=config.deterministic)
    env = open_env(config)
    try:
        if policy is not None:
            policy.backbone.check_env(env.spec)
        out = cli.prepare_folder(Path(config.out), config.overwrite)
        meta: dict[str, Any] = {
            "task": config.env.name,
            "told": env.spec.name,  # what a policy that needs an instruction is told without one
            "env": {key: getattr(config.env, key) for key in builders.ENV_KEYS},
        }
        if env.spec.instructions:
            meta["instructions"] = list(env.spec.instructions)
        store = TrajectoryStore(out, config.episodes, meta, compression=config.compression)
        attempts = collect(env, store, config, teacher)
        store.flush()
        store.close()
    finally:
        env.close()
    for warning in env.pop_warnings():
        print(f"warning: {warning}")
    print(f"{len(store)} demonstrations from {attempts} attempts: {out}")
    return 0


def open_env(config: DemosConfig) -> VecEnv:
    """Builds the environments; each episode is independent of those before it."""
    num_envs = min(config.env.num_envs, config.episodes)
    if config.policy is not None and config.env.type != "maniskill":
        return builders.build_env(config.env, num_envs, torch.device("cpu"))
    # here: a policy may demonstrate in another simulator, where ManiSkill is not installed
    from embodied_rl.envs.demonstrator import make_demonstrators, make_independent

    make = make_demonstrators if config.policy is None else make_independent
    return make(config.env, num_envs)


def collect(
    env: VecEnv, store: TrajectoryStore, config: DemosConfig, teacher: Teacher | None = None
) -> int:
    """Stores the first successful episodes, in the order of their seeds, as many of each task.

    What is stored does not depend on the number of environments.

    Args:
        env: the environments.
        store: receives the demonstrations.
        config: how many, how much noise.
        teacher: who demonstrates; None: the experts beside the simulators.

    Returns:
        How many attempts it took.

    Raises:
        UserError: too few of them succeed.
    """
    told = max(1, len(env.spec.instructions))
    wanted = [config.episodes // told + (i < config.episodes % told) for i in range(told)]
    limit = config.episodes * config.max_steps_multiple
    finished: dict[int, Trajectory | None] = {}  # by attempt; None: lost
    taken = 0  # attempts looked at
    with tqdm(total=config.episodes, unit="demo", dynamic_ncols=True) as bar:
        for attempt, trajectory in _episodes(env, config, teacher or ScriptedTeacher()):
            finished[attempt] = trajectory
            while taken in finished:
                done, taken = finished.pop(taken), taken + 1
                if done is None or not done.fields["success"].any():
                    continue
                task = int(done.fields[f"obs.{INSTRUCTION}"][0]) if env.spec.instructions else 0
                if wanted[task]:
                    wanted[task] -= 1
                    store.append(done)
                    bar.update()
                if not any(wanted):
                    return taken
            if taken >= limit:
                raise UserError(
                    f"only {len(store)} demonstrations of {taken} attempts could be used; lower "
                    "noise, or raise max_steps_multiple."
                )
    raise AssertionError("attempts are endless")


def _episodes(
    env: VecEnv, config: DemosConfig, teacher: Teacher
) -> Iterator[tuple[int, Trajectory | None]]:
    """Yields (attempt, trajectory or None) as episodes end; environment i runs i, i + N, ..."""
    n = env.num_envs
    present = list(range(n))
    numbers = [itertools.count(i + n, n) for i in range(n)]
    following = [next(more) for more in numbers]
    obs = env.reset([config.seed + a for a in present])
    rows: list[list[dict[str, Tensor]]] = [[] for _ in range(n)]
    noise = [_noise(config, a) for a in present]
    while True:
        label = teacher.labels(obs, present)
        push = [rng.standard_normal(label.shape[1]) * config.noise for rng in noise]
        action = (label + torch.from_numpy(np.stack(push))).clamp(-1, 1).float()
        env.send(action, [config.seed + a for a in following])
        result = env.recv()
        for i in range(n):
            row = {f"obs.{k}": v[i] for k, v in obs.items() if k != EXPERT}
            rows[i].append(
                row
                | {
                    "action": action[i][None],
                    EXPERT: label[i][None],
                    "reward": result.reward[i][None],
                    "steps": torch.tensor(1),
                    "terminated": result.terminated[i],
                    "truncated": result.truncated[i],
                    "success": result.success[i],
                }
            )
            lost = bool(result.restarted[i])
            if lost or result.terminated[i] or result.truncated[i]:
                last = {f"obs.{k}": v[i] for k, v in result.final_obs.items() if k != EXPERT}
                yield present[i], None if lost else _close(rows[i], last)
                present[i], following[i], rows[i] = following[i], next(numbers[i]), []
                noise[i] = _noise(config, present[i])
        obs = result.obs


def _noise(config: DemosConfig, attempt: int) -> np.random.Generator:
    return np.random.default_rng([config.seed, attempt])


def _close(rows: list[dict[str, Tensor]], last: dict[str, Tensor]) -> Trajectory:
    """Stacks the rows of an episode and the observation that follows them.

    `action` is what was executed, noise included; `expert_action` what the teacher wanted, which
    is what cloning learns from.
    """
    end = {k: last[k] if k in last else torch.zeros_like(v) for k, v in rows[0].items()}
    return Trajectory({k: torch.stack([r[k] for r in (*rows, end)]) for k in rows[0]})


if __name__ == "__main__":
    cli.run("demos", DemosConfig, main)
