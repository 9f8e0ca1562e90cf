"""`python -m embodied_rl.demos`: collects demonstrations from a scripted expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from embodied_rl import cli
from embodied_rl.config import DemosConfig
from embodied_rl.envs.experts import PickCubeExpert
from embodied_rl.envs.maniskill import ManiSkillEnv
from embodied_rl.errors import UserError
from embodied_rl.load_config import load_config
from embodied_rl.registry import EXPERTS
from embodied_rl.replay.store import TrajectoryStore
from embodied_rl.types import Trajectory


def main(args: list[str]) -> int:
    """Writes a demonstration folder; returns 0."""
    config, _ = load_config(DemosConfig, args)
    torch.set_num_threads(1)
    expert = EXPERTS.get(config.env.task)()
    for key in ("obs_mode", "control_mode"):
        wanted, found = getattr(expert, key), getattr(config.env, key)
        if found != wanted:
            raise UserError(f"env.{key}={found}: the expert for {config.env.task} needs {wanted}.")
    out = cli.prepare_folder(Path(config.out), config.overwrite)
    env = ManiSkillEnv(config.env)
    store = TrajectoryStore(out, config.episodes, {"task": config.env.task})
    rng = np.random.default_rng(config.seed)
    attempts, limit = 0, config.episodes * config.max_steps_multiple
    with tqdm(total=config.episodes, unit="demo") as bar:
        while len(store) < config.episodes:
            if attempts >= limit:
                raise UserError(f"only {len(store)} of {attempts} attempts succeeded; lower noise.")
            fields = _episode(env, expert, config.seed + attempts, config.noise, rng)
            attempts += 1
            if fields["success"].any():
                store.append(Trajectory(fields))
                bar.update()
    store.flush()
    env.close()
    print(f"{len(store)} demonstrations from {attempts} attempts: {out}")
    return 0


def _episode(
    env: ManiSkillEnv, expert: PickCubeExpert, seed: int, noise: float, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Runs one episode to its time limit; returns the fields of a `Trajectory`.

    `action` is what was executed, noise included; `expert_action` what the expert chose, which
    is what cloning learns from.
    """
    obs, done = env.reset(seed), False
    expert.reset()
    names = ("obs.state", "action", "expert_action", "reward", "success")
    rows: dict[str, list[Any]] = {k: [] for k in names}
    while not done:
        label = expert.act(obs["state"])
        rows["expert_action"].append(label[None])
        action = np.clip(label + noise * rng.standard_normal(label.shape), -1, 1)
        rows["obs.state"].append(obs["state"])
        rows["action"].append(action.astype(np.float32)[None])
        obs, reward, terminated, truncated, success = env.step(action.astype(np.float32))
        rows["reward"].append(np.array([reward], np.float32))
        rows["success"].append(success)
        done = terminated or truncated
    rows["obs.state"].append(obs["state"])
    for name in names[1:]:
        rows[name].append(np.zeros_like(rows[name][0]))
    fields = {k: torch.from_numpy(np.asarray(v)) for k, v in rows.items()}
    steps = len(fields["action"])
    fields["steps"] = torch.ones(steps, dtype=torch.int64)
    fields["terminated"] = torch.zeros(steps, dtype=torch.bool)
    fields["truncated"] = torch.zeros(steps, dtype=torch.bool)
    fields["truncated"][steps - 2] = True
    return fields


if __name__ == "__main__":
    cli.run("demos", DemosConfig, main)
