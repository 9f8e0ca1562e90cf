"""ManiSkill tasks: CPU simulation in worker processes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mani_skill import logger

from embodied_rl.config import EnvConfig
from embodied_rl.envs import maniskill_actions, maniskill_contacts, maniskill_poses
from embodied_rl.envs.host import SingleEnv
from embodied_rl.envs.maniskill_task import choose, hide, open_task, refusals, time_limit
from embodied_rl.envs.mixture import MixtureEnv
from embodied_rl.envs.worker import WorkerVecEnv
from embodied_rl.errors import UserError
from embodied_rl.interfaces import VecEnv
from embodied_rl.types import ArraySpec, EnvSpec
from embodied_rl.vulkan import check_render

# Episodes between rebuilds. A rebuild takes 50 ms, as some 20 steps of PickCube do, and a resume
# repeats this many episodes at most (10 s).
REBUILD_EVERY = 32


def make_maniskill(config: EnvConfig, num_envs: int, device: torch.device) -> VecEnv:
    """Builds `num_envs` environments of a ManiSkill task, or of all in `config.instructions`.

    Raises:
        UserError: an unknown task or mode, missing assets, or no usable Vulkan driver.
    """
    if config.sim_backend != "physx_cpu":
        from embodied_rl.envs.maniskill_gpu import make_on_gpu  # here: workers need not have it

        return make_on_gpu(config, num_envs, device)
    return start_workers(build_maniskill, config, num_envs)


def start_workers(
    build: Callable[..., SingleEnv],
    config: EnvConfig,
    num_envs: int,
    rebuild_every: int = REBUILD_EVERY,
) -> WorkerVecEnv:
    """Runs `build(config, render backend)` in `num_envs` processes.

    Raises:
        UserError: as `make_maniskill`.
    """
    if config.sim_backend != "physx_cpu":
        raise UserError(
            f"env.sim_backend={config.sim_backend}: experts act in simulators on the CPU alone. "
            "Set env.sim_backend=physx_cpu."
        )
    render_backend = usable_renderer()
    return WorkerVecEnv(
        build,
        (config, render_backend),
        num_envs,
        preload=(__name__,),
        timeout=config.worker_timeout,
        rebuild_every=rebuild_every,
    )


def usable_renderer() -> str:
    """What renders, "gpu" or "cpu"; asked once, or each worker would print a driver's complaints.

    Raises:
        UserError: there is no usable Vulkan driver.
    """
    render = check_render()
    if not render.ok:
        raise UserError(f"ManiSkill cannot start: {render.detail}. Cure: {render.cure}")
    return render.backend


def build_maniskill(
    config: EnvConfig, render_backend: str = "cpu"
) -> ManiSkillEnv | MixtureEnv[ManiSkillEnv]:
    """Builds the environment that a worker runs: one task, or several with instructions."""
    if not config.instructions:
        return ManiSkillEnv(config, render_backend)
    tasks = [dataclasses.replace(config, task=task) for task in config.instructions]
    envs = [ManiSkillEnv(task, render_backend) for task in tasks]
    return MixtureEnv(envs, list(config.instructions.values()))


class ManiSkillEnv:
    """One ManiSkill task on the CPU, flat in numpy.

    Observation keys: `state` for obs_mode=state; otherwise the leaves of ManiSkill's nested
    dictionary under dotted names, or those of them that `config.obs_keys` lists.

    Args:
        config: task, modes and keyword arguments.
        render_backend: what renders, "gpu" or "cpu", as `vulkan.check_render` found.
    """

    def __init__(self, config: EnvConfig, render_backend: str = "cpu") -> None:
        logger.setLevel(logging.ERROR)  # its warnings on absent GPUs repeat in every worker
        for sooner in (maniskill_poses, maniskill_contacts, maniskill_actions):
            sooner.install()
        self._config, self._ignore_terminations = config, config.ignore_terminations
        with refusals(config):
            self._env = open_task(config, 1, config.sim_backend, render_backend)
            self._sparse_cameras(config.render_every)
            obs = self._flat(self._env.reset(seed=0)[0])
        self.spec = EnvSpec(
            obs={k: ArraySpec(v.shape, torch.from_numpy(v).dtype) for k, v in obs.items()},
            action_dim=int(np.prod(self._env.action_space.shape)),  # type: ignore[arg-type]
            max_episode_steps=time_limit(config),
            name=config.task,
        )

    def _flat(self, obs: Any) -> dict[str, np.ndarray]:
        """The chosen observations of the one environment under dotted names."""
        return {name: _array(value) for name, value in choose(obs, self._config).items()}

    def position(self, name: str) -> np.ndarray:
        """Where an object of the task, or the tool centre `tcp`, is [3], in metres.

        For scripted experts, which may see more than a policy.
        """
        scene: Any = self._env.unwrapped
        found = scene.agent.tcp if name == "tcp" else getattr(scene, name)
        return found.pose.p[0].cpu().numpy()

    def _sparse_cameras(self, every: int) -> None:
        """Lets observations repeat the cameras' last frames, except at every `every`-th step.

        Drawing is three quarters of a step on a CPU, and of a chunk of actions a policy sees the
        last frame alone.
        """
        self._every, self._steps, self._draw = every, 0, True
        if every == 1:
            return
        scene: Any = self._env.unwrapped
        draw, frames = scene._get_obs_sensor_data, {}

        def drawn_or_kept(*args: Any, **kwargs: Any) -> dict[str, Any]:
            if self._draw or not frames:
                frames.update(draw(*args, **kwargs))
            return dict(frames)

        scene._get_obs_sensor_data = drawn_or_kept

    @torch.inference_mode()  # the simulator's many small tensor operations run a sixth faster
    def reset(self, seed: int, *, rebuild: bool = False) -> dict[str, np.ndarray]:
        """Starts the episode that `seed` determines; `rebuild` makes the whole scene anew.

        ManiSkill's contacts are those of the last simulated step, so the first observation after a
        plain reset still shows the previous episode's grasp. One step from the new state refreshes
        them; the second reset takes that step back.
        """
        self._steps, self._draw = 0, False
        self._env.reset(seed=seed, options={"reconfigure": rebuild})
        hide(self._env, self._config)
        self._env.unwrapped.scene.step()  # type: ignore[attr-defined]
        self._draw = True
        return self._flat(self._env.reset(seed=seed)[0])

    @torch.inference_mode()
    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, bool]:
        """Steps the simulator."""
        self._steps += 1
        self._draw = self._steps % self._every == 0
        obs, reward, terminated, truncated, info = self._env.step(action)
        ended = bool(terminated) and not self._ignore_terminations
        if (ended or truncated) and not self._draw:  # a task once solved stays terminated
            self._draw = True
            obs = self._env.unwrapped.get_obs(info)  # type: ignore[attr-defined]
        success = bool(info["success"]) if "success" in info else False
        return self._flat(obs), float(reward), ended, bool(truncated), success

    def render(self) -> np.ndarray:
        """Returns the human-view camera's frame."""
        frame = self._env.render()
        return np.asarray(frame[0].cpu().numpy(), np.uint8)  # type: ignore[index]

    def close(self) -> None:
        """Frees the simulator."""
        self._env.close()


def _array(value: Any) -> np.ndarray:
    """The only row of an observation; a scalar stays an array."""
    array = value.cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    return np.asarray(array[0])
