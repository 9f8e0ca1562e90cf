"""Several tasks in one environment, told apart by an instruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
import torch

from embodied_rl.envs.host import SingleEnv
from embodied_rl.errors import UserError
from embodied_rl.types import INSTRUCTION, ArraySpec, EnvSpec

E = TypeVar("E", bound=SingleEnv)


class MixtureEnv(Generic[E]):
    """One simulator per task; an episode's seed modulo their number picks its task.

    Observations gain `instruction`, the task's index.

    Args:
        envs: one environment per task, with equal observations, actions and time limits.
        instructions: what each task's policy is told.

    Raises:
        UserError: the environments differ in what one policy must be able to rely on.
    """

    def __init__(self, envs: Sequence[E], instructions: Sequence[str]) -> None:
        first = envs[0].spec
        for other in (env.spec for env in envs[1:]):
            _check_equal(first, other)
        self._envs = list(envs)
        self._stale = [False] * len(envs)  # to be rebuilt at the next episode of the task
        self._current = 0
        self.spec = EnvSpec(
            {**first.obs, INSTRUCTION: ArraySpec((), torch.int64)},
            first.action_dim,
            first.max_episode_steps,
            "+".join(env.spec.name for env in envs),
            tuple(instructions),
        )

    @property
    def current(self) -> int:
        """Index of the present episode's task."""
        return self._current

    @property
    def env(self) -> E:
        """The present episode's environment."""
        return self._envs[self._current]

    def _obs(self, obs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**obs, INSTRUCTION: np.asarray(self._current, np.int64)}

    def reset(self, seed: int, *, rebuild: bool = False) -> dict[str, np.ndarray]:
        """Starts the episode that `seed` determines.

        `rebuild` is for all tasks: each is rebuilt when its turn comes, so that what happens from
        here on depends on nothing before.
        """
        if rebuild:
            self._stale = [True] * len(self._envs)
        self._current = seed % len(self._envs)
        stale, self._stale[self._current] = self._stale[self._current], False
        return self._obs(self.env.reset(seed, rebuild=stale))

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, bool]:
        """Steps the present task."""
        obs, reward, terminated, truncated, success = self.env.step(action)
        return self._obs(obs), reward, terminated, truncated, success

    def render(self) -> np.ndarray:
        """Returns a frame of the present task."""
        return self.env.render()

    def close(self) -> None:
        """Frees every simulator."""
        for env in self._envs:
            env.close()


def _check_equal(first: EnvSpec, other: EnvSpec) -> None:
    if first.obs != other.obs:
        names = sorted(k for k in {*first.obs, *other.obs} if first.obs.get(k) != other.obs.get(k))
        raise UserError(
            f"{first.name} and {other.name} observe different things: {', '.join(names)}. Name "
            "what they have in common in env.obs_keys."
        )
    mine = (first.action_dim, first.max_episode_steps)
    theirs = (other.action_dim, other.max_episode_steps)
    if mine != theirs:
        raise UserError(
            f"{first.name} has {mine[0]} action entries and {mine[1]} steps per episode, "
            f"{other.name} {theirs[0]} and {theirs[1]}. Set env.control_mode and "
            "env.max_episode_steps so that they agree."
        )
