"""ManiSkill tasks simulated on a GPU: all environments in one scene, tensors that stay there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mani_skill import logger
from torch import Tensor

from embodied_rl.config import EnvConfig
from embodied_rl.envs.maniskill import usable_renderer
from embodied_rl.envs.maniskill_task import choose, hide, open_task, refusals, time_limit
from embodied_rl.errors import UserError
from embodied_rl.interfaces import VecEnv
from embodied_rl.types import ArraySpec, EnvSpec, Obs, StepResult

# how far an observation may be from the recorded one after a resume: set and read back, a pose
# went through the simulator's own arithmetic
TOLERANCE = 1e-3


def make_on_gpu(config: EnvConfig, num_envs: int, device: torch.device) -> VecEnv:
    """Builds `num_envs` environments of a task on the GPU that `device` names.

    Raises:
        UserError: no GPU, settings that only worker processes know, or as `maniskill_task`.
    """
    if device.type != "cuda":
        raise UserError(
            f"env.sim_backend={config.sim_backend} simulates on a GPU, and device is {device}. "
            "Set device=cuda, or env.sim_backend=physx_cpu."
        )
    return ManiSkillVecEnv(config, num_envs, f"physx_cuda:{device.index or 0}", usable_renderer())


class ManiSkillVecEnv(VecEnv):
    """N environments that ManiSkill steps as one, in this process.

    What differs from one process per environment:

    - ManiSkill draws the first states of all episodes that begin in the same step from one
      generator, so an episode is determined by the seeds of all that begin with it.
    - Physics on a GPU is not deterministic, so resuming puts positions and velocities back as they
      were saved instead of living through the episode again. Episodes that then look different
      (beyond 1e-3) are dropped.
    - An observation of contacts, such as whether something is grasped, may still be the previous
      episode's at the first step of an episode: ManiSkill computes contacts in steps, and here a
      step would move the other environments.

    Args:
        config: task, modes and keyword arguments.
        num_envs: N.
        sim_backend: in ManiSkill's words: physx_cuda:N; physx_cpu where N is 1.
        render_backend: what renders, "gpu" or "cpu".

    Raises:
        UserError: settings that only worker processes know, or as `maniskill_task`.
    """

    def __init__(
        self, config: EnvConfig, num_envs: int, sim_backend: str, render_backend: str
    ) -> None:
        for key, given, wanted in (
            ("instructions", config.instructions, {}),
            ("render_every", config.render_every, 1),
        ):
            if given != wanted:
                raise UserError(
                    f"env.{key}={given} needs env.sim_backend=physx_cpu: all environments in one "
                    f"scene are of one task and are drawn together. Or set env.{key}={wanted}."
                )
        logger.setLevel(logging.ERROR)
        self.num_envs, self._config = num_envs, config
        with refusals(config):
            self._env: Any = open_task(config, num_envs, sim_backend, render_backend)
            hide(self._env, config)
            self._task: Any = self._env.unwrapped
            self.device = torch.zeros(0, device=self._task.device).device  # with its index
            obs = self._observe(self._env.reset(seed=list(range(num_envs)))[0])
        action = self._task.single_action_space
        self.spec = EnvSpec(
            obs={k: ArraySpec(tuple(v.shape[1:]), v.dtype) for k, v in obs.items()},
            action_dim=int(np.prod(action.shape)),
            max_episode_steps=time_limit(config),
            name=config.task,
        )
        self._seeds = list(range(num_envs))  # of the present episodes
        self._following: list[int] = []  # of those after them
        self._actions: Tensor | None = None
        self._shown = obs

    def _observe(self, obs: Any) -> Obs:
        """Copies, as the simulator goes on writing to its own."""
        return {k: torch.as_tensor(v).clone() for k, v in choose(obs, self._config).items()}

    @torch.no_grad()
    def reset(self, seeds: Sequence[int]) -> Obs:
        """Starts a new episode in every environment, after a step so that no contact is old."""
        self._seeds = [int(seed) for seed in seeds]
        self._env.reset(seed=self._seeds)
        self._task.scene.step()
        self._shown = self._observe(self._env.reset(seed=self._seeds)[0])
        return self._shown

    def _begin(self, which: Tensor, seeds: Sequence[int]) -> Obs:
        """Starts the next episode of some environments; returns all observations."""
        for env in which.tolist():
            self._seeds[env] = int(seeds[env])
        told = list(self._seeds)
        told[0] = told[int(which[0])]  # what ManiSkill seeds its generator with
        return self._observe(self._env.reset(seed=told, options={"env_idx": which})[0])

    def state_dict(self) -> dict[str, Any]:
        """Positions and velocities of everything, the controllers' targets, and what is shown."""
        return {
            "seeds": list(self._seeds),
            "simulator": _tensors(self._task.get_state_dict()),
            "elapsed": self._task.elapsed_steps.clone(),
            "shown": self._shown,
        }

    @torch.no_grad()
    def resume(self, state: dict[str, Any], next_seeds: Sequence[int]) -> tuple[Obs, Tensor]:
        """Puts everything back where it was."""
        self._seeds = [int(seed) for seed in state["seeds"]]
        self._env.reset(seed=self._seeds)
        simulator = _moved(state["simulator"], self.device)
        self._put(simulator)
        self._task.scene.step()  # computes the contacts; the second time takes the step back
        self._put(simulator)
        self._task._elapsed_steps[:] = state["elapsed"].to(self.device)
        shown = self._observe(self._task.get_obs(self._task.get_info()))
        restarted = ~_close(shown, _moved(state["shown"], self.device))
        if restarted.any():
            shown = self._begin(restarted.nonzero().flatten(), next_seeds)
        self._shown = shown
        return shown, restarted

    def _put(self, simulator: dict[str, Any]) -> None:
        """Sets positions and velocities, and the controllers' targets, where they have any."""
        self._task.set_state_dict(simulator)
        if "controller" in simulator:
            self._task.agent.set_controller_state(simulator["controller"])

    def send(self, actions: Tensor, next_seeds: Sequence[int]) -> None:
        """Keeps the actions: a GPU does one thing after the other, so `recv` takes the step."""
        self._actions, self._following = actions.to(self.device), [int(s) for s in next_seeds]

    @torch.no_grad()
    def recv(self) -> StepResult:
        """Takes the step; environments whose episodes ended begin the next ones together."""
        obs, reward, terminated, truncated, info = self._env.step(self._actions)
        final = self._observe(obs)
        success = torch.as_tensor(info.get("success", torch.zeros_like(terminated))).bool().clone()
        terminated = torch.as_tensor(terminated).clone()
        if self._config.ignore_terminations:
            terminated.zero_()
        truncated = torch.as_tensor(truncated).clone()
        ended = (terminated | truncated).nonzero().flatten()
        self._shown = self._begin(ended, self._following) if len(ended) else final
        lost = torch.zeros_like(terminated)
        reward = torch.as_tensor(reward).float().clone()
        return StepResult(self._shown, reward, terminated, truncated, success, final, lost)

    def render(self, env: int) -> np.ndarray:
        """Returns the human-view camera's frame of one environment."""
        return np.asarray(self._env.render()[env].cpu().numpy(), np.uint8)

    def close(self) -> None:
        """Frees the simulator."""
        self._env.close()


def _tensors(state: Any) -> Any:
    """Copies of nested tensors, without what holds none."""
    if isinstance(state, dict):
        return {k: _tensors(v) for k, v in state.items() if v is not None and v != {}}
    return state.clone()


def _moved(state: Any, device: torch.device) -> Any:
    if isinstance(state, dict):
        return {k: _moved(v, device) for k, v in state.items()}
    return state.to(device)


def _close(reached: Obs, recorded: Obs) -> Tensor:
    """[N] whether an environment's observations agree."""
    agree = []
    for key, value in recorded.items():
        near = torch.isclose(reached[key].double(), value.double(), rtol=TOLERANCE, atol=TOLERANCE)
        agree.append(near.flatten(1).all(1))
    return torch.stack(agree).all(0)
