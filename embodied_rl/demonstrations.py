"""Demonstrations for pretraining and for the batch: our folders and ManiSkill's .h5 files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from embodied_rl.backbones.state import OBS_KEY, StateBackbone
from embodied_rl.config import Config
from embodied_rl.errors import UserError
from embodied_rl.formats.maniskill import REPLAY, STATE, read_maniskill
from embodied_rl.policy import Policy, find_policy
from embodied_rl.registry import ACTORS
from embodied_rl.replay.meta import META
from embodied_rl.replay.reader import StoreReader, read_all
from embodied_rl.types import ArraySpec, EnvSpec, Features, Obs, Trajectory

DEMOS = "demos"  # folder beside a policy's weights


def find_demos(path: str | None, policy: str | None) -> Path | None:
    """Returns the demonstrations to use: `path`, else those that ship beside the policy, if any."""
    if path is not None:
        return Path(path)
    if policy is None:
        return None
    beside = find_policy(policy) / DEMOS
    return beside if (beside / META).is_file() else None


def demo_folder(config: Config) -> tuple[Path | None, str | None]:
    """Returns the demonstrations that a run mixes in, or None and, where it matters, why.

    Raises:
        UserError: demonstrations were named for an actor that cannot learn from them.
    """
    demo, kind = config.algorithm.demo, config.actor.type
    if demo.fraction == 0:
        return None, None
    if not ACTORS.get(kind).acts_as_demonstrated:
        why = f"the critic of actor.type={kind} judges noise, which demonstrations do not show"
        if demo.path is not None:
            raise UserError(
                f"algorithm.demo.path={demo.path}: {why}. Drop it, or set actor.type=residual."
            )
        return None, f"{why}, so algorithm.demo.fraction={demo.fraction} has no effect"
    path = find_demos(demo.path, config.policy.path)
    why = (
        f"no demonstrations, so algorithm.demo.fraction={demo.fraction} has no effect; name some "
        "with algorithm.demo.path"
    )
    return path, None if path is not None else why


def read_demos(path: Path) -> list[Trajectory]:
    """Reads a demonstration folder or a ManiSkill `.h5` file.

    Raises:
        UserError: nothing there, or not a format we read.
    """
    if path.is_dir():
        trajectories = read_all(path)
    elif path.suffix == ".h5":
        trajectories = _read_maniskill(path)
    else:
        what = "is neither a folder nor a .h5 file" if path.exists() else "does not exist"
        raise UserError(
            f"demonstrations {path}: it {what}. Collect some: python -m embodied_rl.demos "
            f"out={path}"
        )
    if not trajectories:
        raise UserError(f"demonstrations {path}: no trajectory in it.")
    return trajectories


def read_meta(path: Path) -> dict[str, Any]:
    """What a demonstration folder says of all its episodes; empty for an .h5 file."""
    return dict(StoreReader(path).meta) if path.is_dir() else {}


def read_instructions(path: Path) -> list[str]:
    """What `obs.instruction`, an index, stands for in a demonstration folder; empty if unsaid."""
    return list(read_meta(path).get("instructions", []))


def shown_spec(
    trajectories: Sequence[Trajectory], instructions: Sequence[str], name: str
) -> EnvSpec:
    """The environment as far as demonstrations show it: what a policy connects to."""
    first = trajectories[0]
    obs = {
        k.removeprefix("obs."): ArraySpec(tuple(v.shape[1:]), v.dtype)
        for k, v in first.fields.items()
        if k.startswith("obs.")
    }
    longest = max(t.length for t in trajectories)
    return EnvSpec(obs, first.labels.shape[1], longest, name, tuple(instructions))


def _read_maniskill(path: Path) -> list[Trajectory]:
    """ManiSkill's recorded trajectories with state observations (replayed with `-o state`)."""
    trajectories = list(read_maniskill(path).trajectories)
    if trajectories and STATE not in trajectories[0].fields:
        raise UserError(
            f"{path} has dictionary observations; replay it with flat ones: "
            f"{REPLAY} {path} -o state --save-traj"
        )
    return trajectories


def check_demos(path: Path, trajectories: list[Trajectory], policy: Policy) -> None:
    """Raises UserError where demonstrations and policy disagree on sizes."""
    backbone = policy.backbone
    states = trajectories[0].fields.get(f"obs.{OBS_KEY}")
    if isinstance(backbone, StateBackbone) and (
        states is None or states.shape[1] != backbone.feature_dim
    ):
        found = "none" if states is None else f"{states.shape[1]} entries"
        raise UserError(
            f"the state observations in {path}: {found}; the policy reads {backbone.feature_dim}. "
            "Set algorithm.demo.path to demonstrations of this task, or algorithm.demo.fraction=0."
        )
    wanted = (policy.execute_steps, backbone.action_dim)
    found = tuple(trajectories[0].fields["action"].shape[1:])
    if found != wanted:
        raise UserError(
            f"the actions in {path} are [chunk, size] = {list(found)}, the policy's are "
            f"{list(wanted)}. Set algorithm.demo.path to demonstrations of this task and control "
            "mode, or algorithm.demo.fraction=0."
        )


def with_features(trajectory: Trajectory, encode: Callable[[Obs], Features]) -> Trajectory:
    """Adds the backbone's features of every observation."""
    fields = dict(trajectory.fields)
    obs = {k.removeprefix("obs."): v for k, v in fields.items() if k.startswith("obs.")}
    return Trajectory(fields | {k: v.cpu() for k, v in encode(obs).tensors().items()})
