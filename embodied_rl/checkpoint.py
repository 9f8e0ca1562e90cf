"""One atomic save and restore of all stateful parts, in safetensors and JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import embodied_rl
from embodied_rl.errors import UserError
from embodied_rl.interfaces import Stateful
from embodied_rl.manifest import Damaged, sync, verify_manifest, write_manifest
from embodied_rl.policy import Policy

FORMAT = "embodied_rl.checkpoint"
VERSION = 4  # of what this code writes; raised with every change of the state
MIN_READER_VERSION = 4  # oldest reader that understands it; raised when those would go wrong
OLDEST_READABLE = 3
STATE, TENSORS, POLICY = "state.json", "state.safetensors", "policy"
LAST, BEST = "last", "best"
CHECKPOINTS = "checkpoints"  # folder of them in a run folder
SET_ASIDE = "damaged_"  # prefix of checkpoints that did not match their manifest


class Checkpoints:
    """The `checkpoints` folder of a run: `step_<n>` folders, links `last` and `best`.

    Args:
        folder: the run's `checkpoints` folder.
        parts: name to stateful object; all are saved and restored together.
        keep: newest checkpoints kept besides the best.

    Attributes:
        problems: one line for each damaged checkpoint that `restore` set aside.
    """

    def __init__(self, folder: Path, parts: dict[str, Stateful], keep: int) -> None:
        self.folder, self.parts, self.keep = folder, parts, keep
        self.problems: list[str] = []

    @property
    def last(self) -> str | None:
        """Name of the newest checkpoint, None before the first."""
        return self._name_of(LAST)

    @property
    def best(self) -> str | None:
        """Name of the best checkpoint, None where there is none or it was damaged."""
        return self._name_of(BEST)

    def save(
        self, step: int, policy: Policy, *, best: bool, ready: dict[str, Any] | None = None
    ) -> Path:
        """Writes a checkpoint; it appears whole or not at all.

        Args:
            step: environment steps so far.
            policy: saved beside the state.
            best: whether it is the best one so far.
            ready: states of parts that are to be saved as they were when these were made.

        Raises:
            UserError: the disk is full or the folder cannot be written; older ones stay.
        """
        final = self.folder / step_name(step)
        temporary = self.folder / f".{final.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            tensors: dict[str, Tensor] = {}
            ready = ready or {}
            state = {k: ready[k] if k in ready else p.state_dict() for k, p in self.parts.items()}
            tree = split_tensors(state, "", tensors)
            save_file(tensors, temporary / TENSORS)
            document = {
                "format": FORMAT,
                "version": VERSION,
                "min_reader_version": MIN_READER_VERSION,
                "written_by": embodied_rl.__version__,
                "step": step,
                "state": tree,
            }
            (temporary / STATE).write_text(json.dumps(document), encoding="utf-8")
            policy.save_pretrained(temporary / POLICY)
            write_manifest(temporary)
            _fsync_tree(temporary)
            replaced = self.folder / f".{final.name}.old.tmp"
            shutil.rmtree(replaced, ignore_errors=True)
            if final.exists():  # the same step again, after a resume that made no progress
                final.rename(replaced)
            temporary.rename(final)
            shutil.rmtree(replaced, ignore_errors=True)
            self._link(LAST, final)
            if best:
                self._link(BEST, final)
            sync(self.folder)  # the rename must be on disk before anything older is deleted
        except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(
                f"cannot write the checkpoint {final}: {error}. Older checkpoints are intact; free "
                f"some space (df -h), then continue with resume={self.folder.parent}"
            ) from error
        self._prune()
        return final

    @property
    def empty(self) -> bool:
        """Whether no checkpoint was ever finished here, damaged ones included."""
        kinds = ("step_*", f"{SET_ASIDE}*")
        return not any(path for kind in kinds for path in self.folder.glob(kind))

    def restore(self, among: Set[int] | None = None) -> int:
        """Loads the newest undamaged checkpoint into all parts; returns its step.

        Damaged ones that are newer are renamed to `damaged_step_<n>` and told in `problems`.

        Args:
            among: steps to choose from, those that all processes of a run have; newer whole ones
                are deleted. None: all.

        Raises:
            UserError: none is usable, or the newest was written by a later embodied_rl.
        """
        damaged: list[Path] = []
        ahead: list[Path] = []
        for folder in sorted(self.folder.glob("step_*"), reverse=True):
            try:
                state, step = read_checkpoint(folder)
            except Damaged as error:
                self.problems.append(f"{folder.name} is damaged and was not used: {error}.")
                damaged.append(folder)
                continue
            if among is not None and step not in among:
                ahead.append(folder)
                continue
            self._load(state, folder, self.parts)
            for path in ahead:
                shutil.rmtree(path)
            self._after_fallback(folder, damaged)
            return step
        detail = f" {' '.join(self.problems)}" if self.problems else ""
        raise UserError(
            f"{self.folder} holds no usable checkpoint.{detail} Start the run anew (without "
            "resume=)."
        )

    def adopt(self, state: dict[str, Any], source: Path) -> None:
        """Loads the parts that `state` has, which came from `source`.

        Raises:
            UserError: they do not fit.
        """
        self._load(state, source, [name for name in self.parts if name in state])

    def _load(self, state: dict[str, Any], folder: Path, names: Iterable[str]) -> None:
        try:
            for name in names:
                self.parts[name].load_state_dict(state[name])
        except (RuntimeError, KeyError, ValueError) as error:
            raise UserError(
                f"{folder} does not fit this config: {error} A run continues with the networks, "
                "heads, alpha_type and env.num_envs that it began with; drop those overrides."
            ) from None

    def _after_fallback(self, used: Path, damaged: list[Path]) -> None:
        """Sets damaged checkpoints aside, so that none is used, linked to or counted again."""
        best = self.folder / BEST
        target = best.resolve()
        if best.exists() and target not in [p.resolve() for p in (used, *damaged)]:
            try:
                verify_manifest(target)
            except Damaged as error:
                damaged.append(target)
                self.problems.append(f"{target.name}, the best, is damaged: {error}.")
        for folder in damaged:
            aside = self.folder / f"{SET_ASIDE}{folder.name}"
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        if best.is_symlink() and not best.exists():
            best.unlink()
        self._link(LAST, used)

    def _name_of(self, link: str) -> str | None:
        path = self.folder / link
        return path.resolve().name if path.exists() else None

    def _link(self, name: str, target: Path) -> None:
        temporary = self.folder / f".{name}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.name)
        temporary.rename(self.folder / name)

    def _prune(self) -> None:
        folders = sorted(self.folder.glob("step_*"))
        best = (self.folder / BEST).resolve()
        for folder in folders[: -self.keep]:
            if folder.resolve() != best:
                shutil.rmtree(folder)


def step_name(step: int) -> str:
    """Name of the checkpoint of a step."""
    return f"step_{step:09d}"


def step_of(folder: Path) -> int:
    """Step of a checkpoint, as its name says."""
    return int(folder.name.removeprefix("step_"))


def undamaged(folder: Path) -> Iterator[Path]:
    """The checkpoints in a run's `checkpoints` folder that are as they were written, newest first.

    Each is read for that when it is asked for.
    """
    for path in sorted(folder.glob("step_*"), reverse=True):
        try:
            verify_manifest(path)
        except Damaged:
            continue
        yield path


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], int]:
    """Returns the state and the step of one checkpoint.

    Raises:
        Damaged: its files are not those that were written.
        UserError: it is whole, but of a version that this code cannot read.
    """
    verify_manifest(folder)
    try:
        document = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ValueError(f"{STATE} is of another format: {document['format']!r}")
        _check_version(folder, document)
        tensors = load_file(folder / TENSORS)
        state = join_tensors(document["state"], tensors)
        state.setdefault("ranks", {"world": 1})  # version 3 knew of one process only
        return state, int(document["step"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from None


def _check_version(folder: Path, document: dict[str, Any]) -> None:
    version, needs = int(document["version"]), int(document["min_reader_version"])
    if needs > VERSION or version < OLDEST_READABLE:
        cure = "Upgrade" if needs > VERSION else "Downgrade"
        raise UserError(
            f"{folder} was written by embodied_rl {document['written_by']} as checkpoint version "
            f"{version}, which readers of version {needs} or newer understand. This is "
            f"embodied_rl {embodied_rl.__version__}; it reads versions {OLDEST_READABLE} to "
            f"{VERSION}, and newer ones that allow it. {cure} embodied_rl to continue the run."
        )


def split_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Moves the tensors of a nested state into `tensors`, leaving references."""
    if isinstance(value, Tensor):
        name = f"{len(tensors):05d}{path}"  # the number keeps names apart whatever the keys hold
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"$tensor": name}
    if isinstance(value, dict):
        return {"$dict": [[k, split_tensors(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return [split_tensors(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: {type(value).__name__} is neither a tensor nor a JSON value")


def join_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Puts tensors back where `split_tensors` left references."""
    if isinstance(value, list):
        return [join_tensors(v, tensors) for v in value]
    if isinstance(value, dict):
        if "$tensor" in value:
            return tensors[value["$tensor"]]
        return {k: join_tensors(v, tensors) for k, v in value["$dict"]}
    return value


def _fsync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)
