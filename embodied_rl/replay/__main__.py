"""`python -m embodied_rl.replay`: inspects, verifies, merges, exports and imports trajectories."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from embodied_rl.errors import UserError, nearest
from embodied_rl.replay.options import (
    COMMANDS,
    ExportOptions,
    ImportOptions,
    InspectOptions,
    MergeOptions,
    VerifyOptions,
    help_text,
)

USAGE = "python -m embodied_rl.replay"
FORMATS = ("maniskill", "lerobot")
COMPRESSION = ("none", "zstd")
DAMAGED = 1  # exit code of verify


def main(args: list[str]) -> int:
    """Runs one command; returns its exit code."""
    if not args or args[0] not in COMMANDS:
        found = f"unknown command {args[0]!r}." if args else "no command given."
        hint = nearest(args[0], COMMANDS) if args else ""
        raise UserError(f"{found}{hint} Allowed: {', '.join(COMMANDS)}. {USAGE} --help says more.")
    name = args[0]
    options, given = _options(name, args[1:])
    if isinstance(options, InspectOptions):
        return _inspect(options)
    if isinstance(options, VerifyOptions):
        return _verify(options)
    if isinstance(options, MergeOptions):
        return _merge(options)
    if isinstance(options, ExportOptions):
        return _export(options, given)
    return _import(options)


def _options(name: str, words: list[str]) -> tuple[Any, set[str]]:
    """Reads a command's words: `key=value`, and paths."""
    from embodied_rl.load_config import load_config

    paths = [w for w in words if "=" not in w and not w.startswith("-")]
    options, given = load_config(COMMANDS[name], [w for w in words if w not in paths])
    if isinstance(options, MergeOptions):
        options.paths += paths
        found = options.paths
    else:
        found = [*([options.path] if options.path else []), *paths]
        if len(found) > 1:
            raise UserError(f"{name} takes one path, got {len(found)}: {', '.join(found)}.")
        options.path = found[0] if found else None
    if not found:
        raise UserError(f"{name}: no path given. Type {USAGE} {name} PATH; --help says more.")
    for key in ("newest", "fps"):
        value = getattr(options, key, None)
        if value is not None and value < 1:
            raise UserError(f"{key}={value} is out of range. Allowed: [1, infinity).")
    _check_choice("compression", getattr(options, "compression", None), COMPRESSION)
    _check_choice("format", getattr(options, "format", None), FORMATS)
    if getattr(options, "out", "") is None:
        raise UserError(f"{name}: no output given. Set out=; --help says more.")
    return options, given


def _check_choice(key: str, value: str | None, allowed: Iterable[str]) -> None:
    if value is not None and value not in allowed:
        hint = nearest(value, allowed)
        raise UserError(f"{key}={value!r} is not allowed. Allowed: {', '.join(allowed)}.{hint}")


def _inspect(options: InspectOptions) -> int:
    from embodied_rl.replay.tools import find_store, inspect

    print(inspect(find_store(Path(str(options.path))), options.newest))
    return 0


def _verify(options: VerifyOptions) -> int:
    from embodied_rl.replay.tools import find_store, verify

    damaged, summary = verify(find_store(Path(str(options.path))))
    print("\n".join([*damaged, summary]))
    return DAMAGED if damaged else 0


def _merge(options: MergeOptions) -> int:
    from embodied_rl.replay.tools import find_store, select

    folders = [find_store(Path(p)) for p in options.paths]
    selection = select(folders, successful=options.successful, newest=options.newest)
    out = _new_folder(options, folders)
    count = _fill(out, selection, _shared(selection.meta), options)
    return _report(f"{count} trajectories from {len(folders)} stores: {out}", selection.problems)


def _export(options: ExportOptions, given: set[str]) -> int:
    from embodied_rl.formats.recording import Recording
    from embodied_rl.replay.tools import find_store, select

    path, out = Path(str(options.path)), Path(str(options.out))
    folder = find_store(path)
    kind = options.format or ("maniskill" if out.suffix == ".h5" else "lerobot")
    selection = select([folder], successful=options.successful, newest=options.newest)
    recording = Recording(selection, _shared(selection.meta))
    if kind == "maniskill":
        from embodied_rl.formats.maniskill import write_maniskill

        env = _env(options, given, path, selection.meta)
        count = write_maniskill(_new_file(options), recording, env)
    else:
        from embodied_rl.formats.lerobot import arrow
        from embodied_rl.formats.lerobot_writer import write_lerobot

        arrow()  # before anything is deleted
        task = options.task or _env(options, given, path, selection.meta).task
        out = _new_folder(options, [folder])
        count = write_lerobot(out, recording, task, options.fps)
    return _report(f"{count} trajectories: {out}", selection.problems)


def _import(options: ImportOptions) -> int:
    path = Path(str(options.path))
    if path.suffix == ".h5":
        from embodied_rl.formats.maniskill import read_maniskill

        recording = read_maniskill(path)
    else:
        from embodied_rl.formats.lerobot import is_dataset
        from embodied_rl.formats.lerobot_reader import read_lerobot

        if not is_dataset(path):
            what = "is neither an .h5 file nor a LeRobot dataset (a folder with meta/info.json)"
            raise UserError(f"{path} {what if path.exists() else 'does not exist'}.")
        recording = read_lerobot(path)
    out = _new_folder(options, [path])
    count = _fill(out, recording.trajectories, recording.meta, options)
    return _report(f"{count} trajectories: {out}", recording.notes)


def _fill(out: Path, trajectories: Iterable[Any], meta: dict[str, Any], options: Any) -> int:
    """Writes a new store; returns the number of its trajectories."""
    from embodied_rl.replay.store import TrajectoryStore

    store = TrajectoryStore(out, options.segment_size, meta, compression=options.compression)
    for trajectory in trajectories:
        store.append(trajectory)
    store.close()
    return len(store)


def _report(done: str, notes: list[str]) -> int:
    print(done)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def _shared(meta: dict[str, Any]) -> dict[str, Any]:
    """What the trajectories share, without what describes our format."""
    return {k: v for k, v in meta.items() if k not in ("format", "version")}


def _env(options: ExportOptions, given: set[str], path: Path, meta: dict[str, Any]) -> Any:
    """What the trajectories come from: the run's own config, then the store's, then `env` keys."""
    from embodied_rl.load_config import CONFIG, load_run_config

    env = options.env
    named = {k.split(".")[1] for k in given if k.startswith("env.")}
    run = next((p for p in (path, path.parent) if (p / CONFIG).is_file()), None)
    if run is not None:
        recorded = load_run_config(run, [])[0].env
        env = dataclasses.replace(recorded, **{k: getattr(env, k) for k in named})
    elif "task" in meta and "task" not in named:
        env = dataclasses.replace(env, task=meta["task"])
    elif "task" not in named:
        raise UserError(
            f"{path} does not say which task it comes from. Set env.task=, such as "
            "env.task=PickCube-v1, and env.control_mode= if it is another than "
            f"{env.control_mode}."
        )
    return env


def _new_folder(options: Any, sources: list[Path]) -> Path:
    """The output folder, empty; what is read is never replaced."""
    from embodied_rl.cli import prepare_folder

    out = Path(options.out)
    inside = out.resolve()
    for source in (s.resolve() for s in sources):
        if inside == source or inside in source.parents or source in inside.parents:
            raise UserError(f"out={out} and {source} lie in one another. Name another folder.")
    return prepare_folder(out, options.overwrite)


def _new_file(options: ExportOptions) -> Path:
    """The `.h5` file to write, which is not there yet or may be replaced."""
    out = Path(str(options.out))
    if out.suffix != ".h5":
        raise UserError(f"out={out}: a ManiSkill file ends in .h5. Set out={out}.h5.")
    there = [p for p in (out, out.with_suffix(".json")) if p.exists()]
    if there and not options.overwrite:
        raise UserError(f"{there[0]} is there already. Name another out= or set overwrite=true.")
    return out


if __name__ == "__main__":
    if any(a in ("-h", "--help") for a in sys.argv[1:]):
        print(help_text())
        sys.exit(0)
    from embodied_rl import cli

    cli.run("replay", COMMANDS["inspect"], main)
