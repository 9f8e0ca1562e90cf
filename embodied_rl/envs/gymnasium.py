"""Gymnasium environments with Box observations and actions."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.error import Error as GymnasiumError

from embodied_rl.config import EnvConfig
from embodied_rl.envs.worker import WorkerVecEnv
from embodied_rl.errors import UserError, nearest
from embodied_rl.interfaces import VecEnv
from embodied_rl.types import ArraySpec, EnvSpec


def make_gymnasium(config: EnvConfig, num_envs: int, device: torch.device) -> VecEnv:
    """Builds `num_envs` environments of a registered gymnasium task."""
    del device
    return WorkerVecEnv(
        GymnasiumEnv,
        (config,),
        num_envs,
        preload=(__name__,),
        timeout=config.worker_timeout,
        in_process=config.in_process,
    )


class GymnasiumEnv:
    """One gymnasium environment; Box actions are rescaled to [-1, 1].

    Raises:
        UserError: an unknown task, or spaces other than Box.
    """

    def __init__(self, config: EnvConfig) -> None:
        arguments: dict[str, Any] = dict(config.kwargs)
        if config.max_episode_steps is not None:
            arguments["max_episode_steps"] = config.max_episode_steps
        try:
            env = gym.make(config.task, render_mode="rgb_array", **arguments)
        except (GymnasiumError, ImportError, TypeError) as error:
            raise UserError(
                f"gymnasium cannot build env.task={config.task!r}: {error}"
                f"{nearest(config.task, gym.registry)}"
            ) from None
        if not isinstance(env.action_space, gym.spaces.Box):
            raise UserError(f"{config.task} has {env.action_space} actions; only Box is supported.")
        if not isinstance(env.observation_space, gym.spaces.Box):
            raise UserError(
                f"{config.task} has {env.observation_space} observations; only Box is supported."
            )
        self._env = gym.wrappers.RescaleAction(
            env,
            np.full(env.action_space.shape, -1, np.float32),
            np.full(env.action_space.shape, 1, np.float32),
        )
        limit = env.spec.max_episode_steps if env.spec is not None else None
        if limit is None:
            raise UserError(f"{config.task} has no time limit: set env.max_episode_steps.")
        self.spec = EnvSpec(
            obs={"state": ArraySpec((int(np.prod(env.observation_space.shape)),), torch.float32)},
            action_dim=int(np.prod(env.action_space.shape)),
            max_episode_steps=limit,
            name=config.task,
        )

    def _obs(self, obs: np.ndarray) -> dict[str, np.ndarray]:
        return {"state": np.asarray(obs, np.float32).ravel()}

    def reset(self, seed: int, *, rebuild: bool = False) -> dict[str, np.ndarray]:
        """Starts the episode that `seed` determines; gymnasium has nothing to rebuild."""
        del rebuild
        return self._obs(self._env.reset(seed=seed)[0])

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, bool]:
        """Steps; success comes from `info["is_success"]` or `info["success"]` where given."""
        shape = self._env.action_space.shape
        obs, reward, terminated, truncated, info = self._env.step(action.reshape(shape or ()))
        success = bool(info.get("is_success", info.get("success", False)))
        return self._obs(obs), float(reward), bool(terminated), bool(truncated), success

    def render(self) -> np.ndarray:
        """Returns the environment's frame."""
        return np.asarray(self._env.render(), np.uint8)

    def close(self) -> None:
        """Frees the simulator."""
        self._env.close()
