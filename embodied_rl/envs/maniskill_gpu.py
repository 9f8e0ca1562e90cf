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
    renderer, gpu = usable_renderer(), device.index or 0
    # cameras read poses where the physics left them
    where = f"cuda:{gpu}" if renderer == "gpu" else renderer
    return ManiSkillVecEnv(config, num_envs, f"physx_cuda:{gpu}", where)


class ManiSkillVecEnv(VecEnv):
    """N environments that ManiSkill steps as one, in this process.

    What differs from one process per environment:

    - ManiSkill draws the first states of all episodes that begin in the same step from one
      generator, so an episode is determined by the seeds of all that begin with it.
    - The scene is built once, from the seeds of the first reset: in tasks whose objects differ
      from scene to scene, environment i keeps its own.
    - Physics on a GPU is not deterministic, so resuming puts positions and velocities back as they
      were saved instead of living through the episode again. Episodes that then look different
      (numbers beyond 1e-3; images are not compared) are dropped.
    - An observation of contacts, such as whether something is grasped, may still be the previous
      episode's at the first step of an episode that begins while others go on: ManiSkill computes
      contacts in steps, and a step would move the others.

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
        seeds = list(range(num_envs))
        with refusals(config):
            self._env: Any = open_task(config, num_envs, sim_backend, render_backend)
            self._task: Any = self._env.unwrapped
            if num_envs > 1 and self._task.reconfiguration_freq > 0:
                raise UserError(
                    "env.kwargs.reconfiguration_freq: environments on a GPU share a scene"
                )
            self.device = torch.zeros(0, device=self._task.device).device  # with its index
            obs = self._start(seeds, rebuild=False)
        self.spec = EnvSpec(
            obs={k: ArraySpec(tuple(v.shape[1:]), v.dtype) for k, v in obs.items()},
            action_dim=int(np.prod(self._task.single_action_space.shape)),
            max_episode_steps=time_limit(config),
            name=config.task,
        )
        self._seeds = seeds  # of the present episodes
        self._built: list[int] | None = None  # seeds of the scene
        self._following: list[int] = []  # seeds of the episodes after the present ones
        self._actions: Tensor | None = None
        self._shown = obs

    def _observe(self, obs: Any) -> Obs:
        """Copies, as the simulator goes on writing to its own."""
        return {k: torch.as_tensor(v).clone() for k, v in choose(obs, self._config).items()}

    def _start(self, seeds: list[int], *, rebuild: bool) -> Obs:
        """Starts all episodes; the step in between makes ManiSkill forget the contacts it had."""
        self._env.reset(seed=seeds, options={"reconfigure": rebuild})
        hide(self._env, self._config)
        self._task.scene.step()
        return self._observe(self._env.reset(seed=seeds)[0])

    @torch.no_grad()
    def reset(self, seeds: Sequence[int]) -> Obs:
        """Starts a new episode in every environment; the first time it builds the scene."""
        self._seeds = [int(seed) for seed in seeds]
        rebuild = self._built is None
        self._built = self._built or self._seeds
        self._shown = self._start(self._seeds, rebuild=rebuild)
        return self._shown

    def _begin(self, which: Tensor, seeds: Sequence[int]) -> Obs:
        """Starts the next episode of some environments; returns all observations."""
        for env in which.tolist():
            self._seeds[env] = int(seeds[env])
        if len(which) == self.num_envs:
            return self._start(self._seeds, rebuild=False)
        told = list(self._seeds)
        told[0] = told[int(which[0])]  # what ManiSkill seeds its generator with
        agent = self._task.agent
        before = _copied(agent.get_controller_state(), self.device)
        obs = self._env.reset(seed=told, options={"env_idx": which})[0]
        # ManiSkill resets the targets of all controllers
        agent.set_controller_state(_merged(before, agent.get_controller_state(), which))
        return self._observe(obs)

    def state_dict(self) -> dict[str, Any]:
        """Positions, velocities, targets, the task's own tensors, and what is shown."""
        return {
            "seeds": list(self._seeds),
            "built": list(self._built or self._seeds),
            "simulator": _copied(self._task.get_state_dict(), self.device),
            "driven": {k: v.drive_targets.clone() for k, v in self._driven().items()},
            "task": {name: value.clone() for name, value in self._own().items()},
            "shown": self._shown,
        }

    def _driven(self) -> dict[str, Any]:
        """Articulations by name; merged ones are of several kinds, and no robots."""
        found = self._task.scene.articulations
        return {name: a for name, a in found.items() if not a.merged and a.active_joints}

    def _own(self) -> dict[str, Tensor]:
        """Tensors that the task itself keeps for each environment: steps, stages, goals."""
        kept = {k: v for k, v in vars(self._task).items() if isinstance(v, Tensor) and v.dim()}
        return {name: value for name, value in kept.items() if len(value) == self.num_envs}

    @torch.no_grad()
    def resume(self, state: dict[str, Any], next_seeds: Sequence[int]) -> tuple[Obs, Tensor]:
        """Puts everything back where it was.

        Raises:
            UserError: the state is of environments in processes of their own.
        """
        if "simulator" not in state:
            raise UserError(
                "the checkpoint was written with env.sim_backend=physx_cpu, whose episodes a GPU "
                "cannot go on with. Resume with env.sim_backend=physx_cpu, or begin a new run from "
                "the checkpoint's policy: policy.path=RUN."
            )
        self._seeds = [int(seed) for seed in state["seeds"]]
        if self._built != state["built"]:
            self._built = list(state["built"])
            self._start(self._built, rebuild=True)
        self._env.reset(seed=self._seeds)
        self._put(state)
        self._task.scene.step()  # computes the contacts; the second time takes the step back
        self._put(state)
        for name, value in self._own().items():
            if name in state["task"]:
                value.copy_(state["task"][name])
        shown = self._observe(self._task.get_obs(self._task.get_info()))
        restarted = ~_close(shown, _copied(state["shown"], self.device))
        if restarted.any():
            shown = self._begin(restarted.nonzero().flatten(), next_seeds)
        self._shown = shown
        return shown, restarted

    def _put(self, state: dict[str, Any]) -> None:
        """Sets positions, velocities, what joints are driven to, and the controllers' targets."""
        for name, articulation in self._driven().items():
            targets = state["driven"][name].to(self.device)
            articulation.set_joint_drive_targets(targets, joints=articulation.active_joints)
        simulator = _copied(state["simulator"], self.device)
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


def _copied(state: Any, device: torch.device) -> Any:
    """Copies of nested tensors, without what holds none."""
    if isinstance(state, dict):
        return {k: _copied(v, device) for k, v in state.items() if v is not None and v != {}}
    return state.to(device, copy=True)


def _merged(before: Any, after: Any, which: Tensor) -> Any:
    """`before`, but for some environments `after`."""
    if isinstance(before, dict):
        return {key: _merged(value, after[key], which) for key, value in before.items()}
    before[which] = after[which]
    return before


def _close(reached: Obs, recorded: Obs) -> Tensor:
    """[N] whether an environment's observations agree; a camera may see a pixel otherwise."""
    first = next(iter(recorded.values()))
    agree = [torch.ones(len(first), dtype=torch.bool, device=first.device)]
    for key, value in recorded.items():
        if value.is_floating_point() or value.dtype == torch.bool:
            near = torch.isclose(
                reached[key].double(), value.double(), rtol=TOLERANCE, atol=TOLERANCE
            )
            agree.append(near.reshape(len(near), -1).all(1))
    return torch.stack(agree).all(0)
