"""ManiSkill's recorded trajectories: an `.h5` file, and a `.json` file of the same name.

    traj_0/obs          [T + 1, D], or a group with a dataset per observation
    traj_0/actions      [T, A]
    traj_0/rewards, success, terminated, truncated   [T]
    traj_0/embodied_rl  ours: fields [T + 1, ...] that the others cannot hold, for an exact return

ManiSkill's own readers leave the last group alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from embodied_rl.config import EnvConfig
from embodied_rl.errors import UserError
from embodied_rl.formats.recording import Recording, check_single_steps, same
from embodied_rl.types import Trajectory

OWN = "embodied_rl"  # group and JSON key of what only we read
STATE = "obs.state"
IMAGES = ("rgb", "depth", "seg", "segmentation")  # compressed, as ManiSkill does
KNOWN = {"obs", "actions", "rewards", "success", "terminated", "truncated", OWN}
REPLAY = "python -m mani_skill.trajectory.replay_trajectory --traj-path"


def read_maniskill(path: Path) -> Recording:
    """Opens an `.h5` file; dictionary observations come back under dotted names.

    Raises:
        UserError: not a trajectory file with observations and rewards (also while reading).
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    sidecar = path.with_suffix(".json")
    meta: dict[str, Any] = {}
    if sidecar.is_file():
        try:
            document = json.loads(sidecar.read_text(encoding="utf-8"))
            meta = document[OWN] if OWN in document else {"task": document["env_info"]["env_id"]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{sidecar} is not a ManiSkill description ({error!r}). Copy it again, or move it "
                "away: the .h5 file can be read without it."
            ) from None
    recording = Recording((), meta)
    recording.trajectories = _read(path, recording.notes)
    return recording


def _read(path: Path, notes: list[str]) -> Iterator[Trajectory]:
    skipped: set[str] = set()
    try:
        with h5py.File(path) as file:
            names: list[str] = [str(n) for n in file]
            for name in sorted(names, key=lambda n: int(n.rpartition("_")[2])):
                group = file[name]
                if not isinstance(group, h5py.Group):
                    raise ValueError(f"{name} is no group")
                skipped |= set(group) - KNOWN
                yield Trajectory({**_fields(group), **_own(group)})
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is not a ManiSkill trajectory file with observations and rewards "
            f"({error}). Make one: {REPLAY} {path} -o state --record-rewards True --save-traj"
        ) from None
    if skipped:
        notes.append(f"not read, for want of a place: {', '.join(sorted(skipped))}.")


def _fields(group: h5py.Group) -> dict[str, Tensor]:
    """The fields that ManiSkill's own datasets hold, [T + 1, ...] each."""

    def rows(name: str, dtype: type) -> Tensor:
        values = np.asarray(group[name], dtype)
        return torch.from_numpy(np.concatenate([values, np.zeros_like(values[:1])]))

    action = rows("actions", np.float32)
    end = torch.zeros(len(action), dtype=torch.bool)
    # whether the recording stopped at its time limit or at success, the task goes on from there
    return {
        **_observations(group["obs"]),
        "action": action[:, None],
        "reward": rows("rewards", np.float32)[:, None],
        "steps": torch.ones(len(action), dtype=torch.int64),
        "terminated": end,
        "truncated": end.clone(),
        "success": rows("success", np.bool_),
    }


def _observations(obs: Any) -> dict[str, Tensor]:
    if isinstance(obs, h5py.Dataset):
        return {STATE: torch.from_numpy(np.asarray(obs, np.float32))}
    found: dict[str, Tensor] = {}

    def visit(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            found[f"obs.{name.replace('/', '.')}"] = torch.from_numpy(node[()])

    obs.visititems(visit)
    return found


def _own(group: h5py.Group) -> dict[str, Tensor]:
    if OWN not in group:  # ManiSkill wrote it
        return {}
    extra: Any = group[OWN]
    return {str(name): torch.from_numpy(extra[name][()]) for name in extra}


def write_maniskill(path: Path, recording: Recording, env: EnvConfig) -> int:
    """Writes `.h5` and `.json`; returns the number of trajectories.

    `read_maniskill` gives every field back bit for bit. The store knows neither seeds nor simulator
    states, so ManiSkill can load the file but not simulate its episodes again.

    Args:
        path: ends in `.h5`.
        recording: what to write; decisions of one action.
        env: what the trajectories come from: task, modes and time limit, for the `.json`.

    Raises:
        UserError: chunks of several actions, or the files cannot be written.
    """
    temporary, sidecar = path.with_suffix(".h5.tmp"), path.with_suffix(".json")
    episodes: list[dict[str, Any]] = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(temporary, "w") as file:
            for number, trajectory in enumerate(recording.trajectories):
                check_single_steps(trajectory, f"trajectory {number}")
                group = file.create_group(f"traj_{number}", track_order=True)
                _write(group, trajectory)
                episodes.append(_episode(number, trajectory, env))
        document = {"env_info": _env_info(env), "commit_info": None, "episodes": episodes}
        text = json.dumps({**document, OWN: recording.meta}, indent=2)
        sidecar.write_text(text + "\n", encoding="utf-8")
        temporary.rename(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error}. Free some space (df -h) or name another out=."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(episodes)


def _write(group: h5py.Group, trajectory: Trajectory) -> None:
    fields = trajectory.fields
    observations = {k.removeprefix("obs."): v for k, v in fields.items() if k.startswith("obs.")}
    if list(observations) == ["state"]:
        group["obs"] = observations["state"].numpy()
    else:
        for name, value in observations.items():
            _dataset(group, f"obs/{name.replace('.', '/')}", value.numpy())
    group["actions"] = fields["action"][:-1, 0].numpy()
    group["rewards"] = fields["reward"][:-1, 0].numpy()
    for name in ("success", "terminated", "truncated"):
        group[name] = fields[name][:-1].numpy()
    readable = _fields(group)
    for name, value in fields.items():
        if not same(readable.get(name), value):
            _dataset(group, f"{OWN}/{name}", value.numpy())


def _dataset(group: h5py.Group, name: str, values: np.ndarray) -> None:
    image = name.rpartition("/")[2] in IMAGES or values.ndim > 2
    compression = {"compression": "gzip", "compression_opts": 5} if image else {}
    group.create_dataset(name, data=values, **compression)


def _episode(number: int, trajectory: Trajectory, env: EnvConfig) -> dict[str, Any]:
    return {
        "episode_id": number,
        "episode_seed": None,
        "control_mode": env.control_mode,
        "elapsed_steps": trajectory.length,
        "reset_kwargs": {},
        "success": bool(trajectory.fields["success"][-2]),
    }


def _env_info(env: EnvConfig) -> dict[str, Any]:
    modes = ("obs_mode", "control_mode", "reward_mode", "sim_backend")
    return {
        "env_id": env.task,
        "env_kwargs": {**{mode: getattr(env, mode) for mode in modes}, **env.kwargs},
        "max_episode_steps": env.max_episode_steps,
    }
