"""ManiSkill tasks: CPU simulation in worker processes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import mani_skill.envs  # noqa: F401 - registers the tasks
import numpy as np
import torch
from mani_skill import logger
from mani_skill.utils import assets
from mani_skill.utils.registration import REGISTERED_ENVS
from mani_skill.utils.structs import Actor

from embodied_rl.config import EnvConfig
from embodied_rl.envs import maniskill_poses
from embodied_rl.envs.host import SingleEnv
from embodied_rl.envs.mixture import MixtureEnv
from embodied_rl.envs.worker import WorkerVecEnv
from embodied_rl.errors import UserError, nearest
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
    del device
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
            f"env.sim_backend={config.sim_backend!r} is not supported. Allowed: physx_cpu."
        )
    render = check_render()  # here, once: every worker would print the driver's own complaints
    if not render.ok:
        raise UserError(f"ManiSkill cannot start: {render.detail}. Cure: {render.cure}")
    return WorkerVecEnv(
        build,
        (config, render.backend),
        num_envs,
        preload=(__name__,),
        timeout=config.worker_timeout,
        rebuild_every=rebuild_every,
    )


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
        maniskill_poses.install()
        if config.task not in REGISTERED_ENVS:
            raise UserError(
                f"env.task={config.task!r} is not a ManiSkill task."
                f"{nearest(config.task, REGISTERED_ENVS)} Tasks: "
                f"{', '.join(sorted(REGISTERED_ENVS))}."
            )
        missing = _missing_assets(config.task)
        if missing:
            raise UserError(
                f"env.task={config.task} needs the assets {', '.join(missing)}, which are not on "
                "this machine. Fetch them: python -m mani_skill.utils.download_asset "
                f"{config.task} -y"
            )
        self._name, self._keys, self._hidden = (
            config.task,
            list(config.obs_keys),
            list(config.hidden_objects),
        )
        self._ignore_terminations = config.ignore_terminations
        size = {"width": config.render_size, "height": config.render_size}
        arguments: dict[str, Any] = {
            "num_envs": 1,
            "obs_mode": config.obs_mode,
            "control_mode": config.control_mode,
            "reward_mode": config.reward_mode,
            "sim_backend": config.sim_backend,
            "render_backend": render_backend,
            "render_mode": "rgb_array",
            "human_render_camera_configs": size,
            **config.kwargs,
        }
        if config.max_episode_steps is not None:
            arguments["max_episode_steps"] = config.max_episode_steps
        try:
            self._env = gym.make(config.task, **arguments)
            self._sparse_cameras(config.render_every)
            obs = self._flat(self._env.reset(seed=0)[0])
        except RuntimeError as error:
            raise UserError(f"ManiSkill cannot build {config.task}: {error}") from None
        except (AssertionError, KeyError, NotImplementedError, TypeError, ValueError) as error:
            raise UserError(
                f"ManiSkill refuses env.task={config.task} with obs_mode={config.obs_mode}, "
                f"control_mode={config.control_mode}, reward_mode={config.reward_mode}, "
                f"kwargs={config.kwargs}: {type(error).__name__}: {error}"
            ) from None
        self.spec = EnvSpec(
            obs={k: ArraySpec(v.shape, torch.from_numpy(v).dtype) for k, v in obs.items()},
            action_dim=int(np.prod(self._env.action_space.shape)),  # type: ignore[arg-type]
            max_episode_steps=config.max_episode_steps or self._time_limit(),
            name=config.task,
        )

    def _time_limit(self) -> int:
        limit = REGISTERED_ENVS[self._name].max_episode_steps
        if limit is None:
            raise UserError(
                f"{self._name} has no time limit of its own: set env.max_episode_steps."
            )
        return int(limit)

    def _flat(self, obs: Any) -> dict[str, np.ndarray]:
        """The chosen observations under dotted names.

        Raises:
            UserError: the task has no such observation.
        """
        flat = _flat(obs)
        unknown = [key for key in self._keys if key not in flat]
        if unknown:
            raise UserError(
                f"env.obs_keys: {self._name} has no observation {unknown[0]!r}."
                f"{nearest(unknown[0], flat)} It has: {', '.join(flat)}."
            )
        return {key: flat[key] for key in self._keys} if self._keys else flat

    def _hide(self) -> None:
        """Hides what cameras in observations shall not see; a rebuilt scene has new objects.

        Raises:
            UserError: the task has no such object.
        """
        scene: Any = self._env.unwrapped
        for name in self._hidden:
            found = getattr(scene, name, None)
            if not isinstance(found, Actor):
                objects = sorted(k for k, v in vars(scene).items() if isinstance(v, Actor))
                raise UserError(
                    f"env.hidden_objects: {self._name} has no object {name!r}."
                    f"{nearest(name, objects)} It has: {', '.join(objects)}."
                )
            if not any(found is hidden for hidden in scene._hidden_objects):
                scene._hidden_objects.append(found)

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
        self._hide()
        self._env.unwrapped.scene.step()  # type: ignore[attr-defined]
        self._draw = True
        return self._flat(self._env.reset(seed=seed)[0])

    @torch.inference_mode()
    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, bool]:
        """Steps the simulator."""
        self._steps += 1
        self._draw = self._steps % self._every == 0
        obs, reward, terminated, truncated, info = self._env.step(action)
        if (terminated or truncated) and not self._draw:
            self._draw = True
            obs = self._env.unwrapped.get_obs(info)  # type: ignore[attr-defined]
        success = bool(info["success"]) if "success" in info else False
        ended = bool(terminated) and not self._ignore_terminations
        return self._flat(obs), float(reward), ended, bool(truncated), success

    def render(self) -> np.ndarray:
        """Returns the human-view camera's frame."""
        frame = self._env.render()
        return np.asarray(frame[0].cpu().numpy(), np.uint8)  # type: ignore[index]

    def close(self) -> None:
        """Frees the simulator."""
        self._env.close()


def _missing_assets(task: str) -> list[str]:
    """Asset ids that the task needs and this machine lacks; ManiSkill itself would prompt."""
    ids: list[str] = []
    for asset in REGISTERED_ENVS[task].asset_download_ids or []:
        grouped = asset in assets.DATA_GROUPS
        ids += (
            assets.expand_data_group_into_individual_data_source_ids(asset) if grouped else [asset]
        )
    return [i for i in ids if not assets.is_data_source_downloaded(i)]


def _flat(obs: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Nested observations with a leading axis of 1 to flat numpy arrays."""
    if isinstance(obs, dict):
        out: dict[str, np.ndarray] = {}
        for key, value in obs.items():
            out.update(_flat(value, f"{prefix}.{key}" if prefix else key))
        return out
    array = obs.cpu().numpy() if isinstance(obs, torch.Tensor) else np.asarray(obs)
    return {prefix or "state": np.asarray(array[0])}  # a scalar stays an array
