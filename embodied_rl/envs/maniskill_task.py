"""What environments of a ManiSkill task have in common, wherever they are simulated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import mani_skill.envs  # noqa: F401 - registers the tasks
from mani_skill.utils import assets
from mani_skill.utils.registration import REGISTERED_ENVS
from mani_skill.utils.structs import Actor

from embodied_rl.config import EnvConfig
from embodied_rl.errors import UserError, nearest


def open_task(config: EnvConfig, num_envs: int, sim_backend: str, render_backend: str) -> gym.Env:
    """Builds a ManiSkill environment.

    Args:
        config: task, modes and keyword arguments.
        num_envs: environments in it, which ManiSkill steps as one.
        sim_backend: in ManiSkill's words: physx_cpu, physx_cuda:N.
        render_backend: what renders, "gpu" or "cpu", as `vulkan.check_render` found.

    Raises:
        UserError: an unknown task, or missing assets. What ManiSkill itself raises is for
            `refusals` to tell.
    """
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
    size = {"width": config.render_size, "height": config.render_size}
    arguments: dict[str, Any] = {
        "num_envs": num_envs,
        "obs_mode": config.obs_mode,
        "control_mode": config.control_mode,
        "reward_mode": config.reward_mode,
        "sim_backend": sim_backend,
        "render_backend": render_backend,
        "render_mode": "rgb_array",
        "human_render_camera_configs": size,
        **config.kwargs,
    }
    if config.max_episode_steps is not None:
        arguments["max_episode_steps"] = config.max_episode_steps
    return gym.make(config.task, **arguments)


@contextlib.contextmanager
def refusals(config: EnvConfig) -> Iterator[None]:
    """Tells the user what ManiSkill raises while an environment is built and first reset."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"ManiSkill cannot build {config.task}: {error}") from None
    except (AssertionError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise UserError(
            f"ManiSkill refuses env.task={config.task} with obs_mode={config.obs_mode}, "
            f"control_mode={config.control_mode}, reward_mode={config.reward_mode}, "
            f"kwargs={config.kwargs}: {type(error).__name__}: {error}"
        ) from None


def time_limit(config: EnvConfig) -> int:
    """Steps of an episode.

    Raises:
        UserError: neither the task nor the config has a limit.
    """
    limit = config.max_episode_steps or REGISTERED_ENVS[config.task].max_episode_steps
    if limit is None:
        raise UserError(f"{config.task} has no time limit of its own: set env.max_episode_steps.")
    return int(limit)


def choose(obs: Any, config: EnvConfig) -> dict[str, Any]:
    """The leaves of ManiSkill's observations under dotted names; those that `obs_keys` lists.

    A bare tensor is called `state`.

    Raises:
        UserError: the task has no such observation.
    """
    flat = dict(_leaves(obs, ""))
    unknown = [key for key in config.obs_keys if key not in flat]
    if unknown:
        raise UserError(
            f"env.obs_keys: {config.task} has no observation {unknown[0]!r}."
            f"{nearest(unknown[0], flat)} It has: {', '.join(flat)}."
        )
    return {key: flat[key] for key in config.obs_keys} if config.obs_keys else flat


def hide(env: gym.Env, config: EnvConfig) -> None:
    """Hides what cameras in observations shall not see; a rebuilt scene has new objects.

    Raises:
        UserError: the task has no such object.
    """
    scene: Any = env.unwrapped
    for name in config.hidden_objects:
        found = getattr(scene, name, None)
        if not isinstance(found, Actor):
            objects = sorted(k for k, v in vars(scene).items() if isinstance(v, Actor))
            raise UserError(
                f"env.hidden_objects: {config.task} has no object {name!r}."
                f"{nearest(name, objects)} It has: {', '.join(objects)}."
            )
        if not any(found is hidden for hidden in scene._hidden_objects):
            scene._hidden_objects.append(found)


def _leaves(obs: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(obs, dict):
        for key, value in obs.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix or "state", obs


def _missing_assets(task: str) -> list[str]:
    """Asset ids that the task needs and this machine lacks; ManiSkill itself would prompt."""
    ids: list[str] = []
    for asset in REGISTERED_ENVS[task].asset_download_ids or []:
        grouped = asset in assets.DATA_GROUPS
        ids += (
            assets.expand_data_group_into_individual_data_source_ids(asset) if grouped else [asset]
        )
    return [i for i in ids if not assets.is_data_source_downloaded(i)]
