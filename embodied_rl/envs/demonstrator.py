"""A ManiSkill environment that tells at every step what a scripted expert would do."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from embodied_rl.config import EnvConfig
from embodied_rl.envs.experts import Expert
from embodied_rl.envs.maniskill import ManiSkillEnv, build_maniskill, start_workers
from embodied_rl.envs.mixture import MixtureEnv
from embodied_rl.envs.worker import WorkerVecEnv
from embodied_rl.errors import UserError
from embodied_rl.registry import EXPERTS
from embodied_rl.types import EXPERT, ArraySpec, EnvSpec


def make_demonstrators(config: EnvConfig, num_envs: int) -> WorkerVecEnv:
    """Builds `num_envs` of them; each episode is independent of those before it.

    Raises:
        UserError: no expert for a task, or settings that it is not for.
    """
    for task in tasks(config):
        expert = EXPERTS.get(task)
        for key in ("obs_mode", "control_mode"):
            wanted, found = getattr(expert, key), getattr(config, key)
            if wanted is not None and found != wanted:
                raise UserError(f"env.{key}={found}: the expert for {task} needs {wanted}.")
    config = dataclasses.replace(config, render_every=1)  # policies may decide at any step
    return start_workers(build_demonstrator, config, num_envs, rebuild_every=1)


def make_independent(config: EnvConfig, num_envs: int) -> WorkerVecEnv:
    """Builds `num_envs` of them without experts, otherwise alike: for policies that demonstrate."""
    config = dataclasses.replace(config, render_every=1)
    return start_workers(build_maniskill, config, num_envs, rebuild_every=1)


def tasks(config: EnvConfig) -> list[str]:
    """The tasks that an environment of this config holds."""
    return list(config.instructions) or [config.task]


def build_demonstrator(config: EnvConfig, render_backend: str = "cpu") -> Demonstrator:
    """Builds the environment that a worker runs."""
    experts = [EXPERTS.get(task)() for task in tasks(config)]
    return Demonstrator(build_maniskill(config, render_backend), experts)


class Demonstrator:
    """Adds `expert_action` [A], what the task's expert chooses there, to the observations.

    Args:
        env: one task or several.
        experts: one per task.
    """

    def __init__(self, env: ManiSkillEnv | MixtureEnv[ManiSkillEnv], experts: list[Expert]) -> None:
        self._env, self._experts = env, experts
        inner = env.spec
        self.spec = EnvSpec(
            {**inner.obs, EXPERT: ArraySpec((inner.action_dim,), torch.float32)},
            inner.action_dim,
            inner.max_episode_steps,
            inner.name,
            inner.instructions,
        )

    def _label(self, obs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if isinstance(self._env, MixtureEnv):
            task, env = self._env.current, self._env.env
        else:
            task, env = 0, self._env
        return {**obs, EXPERT: self._experts[task].act(obs, env.position)}

    def reset(self, seed: int, *, rebuild: bool = False) -> dict[str, np.ndarray]:
        """Starts the episode that `seed` determines."""
        for expert in self._experts:
            expert.reset()
        return self._label(self._env.reset(seed, rebuild=rebuild))

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, bool]:
        """Steps the simulator."""
        obs, reward, terminated, truncated, success = self._env.step(action)
        return self._label(obs), reward, terminated, truncated, success

    def render(self) -> np.ndarray:
        """Returns the human-view camera's frame."""
        return self._env.render()

    def close(self) -> None:
        """Frees the simulator."""
        self._env.close()
