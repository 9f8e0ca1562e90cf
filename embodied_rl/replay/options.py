"""What `python -m embodied_rl.replay` reads: a dataclass per command, and their help."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Optional

from embodied_rl.config import EnvConfig

# ruff: noqa: UP045 - OmegaConf reads Optional[...] annotations on every Python it supports


def key(default: Any, text: str) -> Any:
    """A key with the line that `--help` prints for it."""
    return field(default=default, metadata={"help": text})


@dataclass
class InspectOptions:
    """what a run's replay, a store or a demonstration folder holds; changes nothing."""

    path: Optional[str] = None
    newest: Optional[int] = key(1000, "trajectories that success and return are taken from")


@dataclass
class VerifyOptions:
    """reads everything and compares checksums; exit code 1 where something is damaged."""

    path: Optional[str] = None


@dataclass
class MergeOptions:
    """several stores into a new one."""

    paths: list[str] = field(default_factory=list)
    out: Optional[str] = key(None, "folder of the new store")
    successful: bool = key(False, "only trajectories in which success held at some step")
    newest: Optional[int] = key(None, "only the last so many, in the order of the stores given")
    segment_size: int = key(64, "trajectories per file")
    compression: str = key("none", "none | zstd, of images")
    overwrite: bool = key(False, "replace what is in out")


@dataclass
class ExportOptions:
    """a store to ManiSkill's .h5 and .json, or to a LeRobot dataset."""

    path: Optional[str] = None
    out: Optional[str] = key(None, "file.h5 for ManiSkill, a folder for LeRobot")
    format: Optional[str] = key(None, "maniskill | lerobot; null: as out says")
    successful: bool = key(False, "only trajectories in which success held at some step")
    newest: Optional[int] = key(None, "only the last so many")
    task: Optional[str] = key(None, "LeRobot: the instruction in words; null: env.task")
    fps: int = key(20, "LeRobot: decisions per second of the robot (ManiSkill's default: 20)")
    # what the trajectories come from; a run folder knows it
    env: EnvConfig = field(default_factory=EnvConfig)
    overwrite: bool = key(False, "replace what is in out")


@dataclass
class ImportOptions:
    """a ManiSkill .h5 file or a LeRobot dataset to a new store."""

    path: Optional[str] = None
    out: Optional[str] = key(None, "folder of the new store")
    segment_size: int = key(64, "trajectories per file")
    compression: str = key("none", "none | zstd, of images")
    overwrite: bool = key(False, "replace what is in out")


COMMANDS: dict[str, type[Any]] = {
    "inspect": InspectOptions,
    "verify": VerifyOptions,
    "merge": MergeOptions,
    "export": ExportOptions,
    "import": ImportOptions,
}


def help_text() -> str:
    """Returns the usage of all commands."""
    lines = ["usage: python -m embodied_rl.replay COMMAND PATH [key=value ...]", ""]
    for name, schema in COMMANDS.items():
        where = "PATH PATH ..." if name == "merge" else "PATH"
        lines.append(f"  {name} {where}: {(schema.__doc__ or '').strip()}")
        for f in dataclasses.fields(schema):
            if "help" in f.metadata:
                default = {None: "null", True: "true", False: "false"}.get(f.default, f.default)
                lines.append(f"      {f.name + '=' + str(default):<20} {f.metadata['help']}")
            elif f.name == "env":
                lines.append(f"      {'env.task=...':<20} and the other env keys of a run")
        lines.append("")
    lines += [
        "PATH is a run folder, a store, or a demonstration folder (import: what to read).",
        "More: docs/replay_tools.md.",
    ]
    return "\n".join(lines)
