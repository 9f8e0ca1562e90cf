"""A deterministic environment for tests: a point that must reach the origin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied_rl.config import EnvConfig
from embodied_rl.errors import UserError, nearest
from embodied_rl.interfaces import VecEnv
from embodied_rl.types import ArraySpec, EnvSpec, Obs, StepResult

TASKS = {"reach": False, "reach-terminates": True}
DIM, STEP, GOAL = 2, 0.2, 0.15


def make_fake(config: EnvConfig, num_envs: int, device: torch.device) -> VecEnv:
    """Builds the fake environment; `reach-terminates` ends episodes on success."""
    return FakeVecEnv(num_envs, config, device)


class FakeVecEnv(VecEnv):
    """Points in the plane moved by the action; every observation tells episode seed and step.

    Observation `state` [4]: position (2), episode seed, step. Reward is minus the distance to the
    origin; success within 0.15.

    Args:
        num_envs: N.
        config: task and time limit.
        device: where tensors live.
    """

    def __init__(self, num_envs: int, config: EnvConfig, device: torch.device) -> None:
        if config.task not in TASKS:
            raise UserError(
                f"env.task={config.task!r} is not a fake task. Allowed: {', '.join(TASKS)}."
                f"{nearest(config.task, TASKS)}"
            )
        self.num_envs, self.device = num_envs, device
        limit = config.max_episode_steps or 20
        self.spec = EnvSpec(
            {"state": ArraySpec((DIM + 2,), torch.float32)}, DIM, limit, f"fake {config.task}"
        )
        self._terminates = TASKS[config.task]
        self._state = np.zeros((num_envs, DIM + 2), np.float32)
        self._result: StepResult | None = None

    def _start(self, i: int, seed: int) -> None:
        position = np.random.default_rng(seed).uniform(-1, 1, DIM)
        self._state[i] = (*position, seed % 10_000, 0)

    def _obs(self) -> Obs:
        return {"state": torch.from_numpy(self._state.copy()).to(self.device)}

    def reset(self, seeds: Sequence[int]) -> Obs:
        """Places every point as its seed says."""
        for i, seed in enumerate(seeds):
            self._start(i, seed)
        return self._obs()

    def state_dict(self) -> dict[str, Any]:
        """Where every point is."""
        return {"state": torch.from_numpy(self._state.copy())}

    def resume(self, state: dict[str, Any], next_seeds: Sequence[int]) -> tuple[Obs, Tensor]:
        """Puts every point back."""
        self._state[:] = state["state"].numpy()
        return self._obs(), torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)

    def send(self, actions: Tensor, next_seeds: Sequence[int]) -> None:
        """Moves every point by 0.2 times its action."""
        self._state[:, :DIM] += STEP * actions.cpu().numpy().clip(-1, 1)
        self._state[:, DIM + 1] += 1
        distance = np.linalg.norm(self._state[:, :DIM], axis=1)
        success = distance < GOAL
        terminated = success & self._terminates
        truncated = ~terminated & (self._state[:, DIM + 1] >= self.spec.max_episode_steps)
        final = self._obs()
        for i in np.flatnonzero(terminated | truncated).tolist():
            self._start(i, next_seeds[i])
        ended, cut, reached = (
            torch.from_numpy(f).to(self.device) for f in (terminated, truncated, success)
        )
        reward = torch.from_numpy(-distance.astype(np.float32)).to(self.device)
        lost = torch.zeros_like(ended)
        self._result = StepResult(self._obs(), reward, ended, cut, reached, final, lost)

    def recv(self) -> StepResult:
        """Returns the step that `send` took."""
        if self._result is None:
            raise RuntimeError("recv without send")
        result, self._result = self._result, None
        return result

    def render(self, env: int) -> np.ndarray:
        """Draws the point as a white square on a 64-pixel frame."""
        frame = np.zeros((64, 64, 3), np.uint8)
        x, y = ((np.clip(self._state[env][:DIM], -2, 2) + 2) / 4 * 60).astype(int)
        frame[y : y + 4, x : x + 4] = 255
        return frame

    def close(self) -> None:
        """Nothing to free."""
