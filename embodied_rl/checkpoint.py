"""One atomic save and restore of all stateful parts, in safetensors and JSON."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from embodied_rl.errors import UserError
from embodied_rl.interfaces import Stateful
from embodied_rl.policy import Policy

FORMAT, VERSION = "embodied_rl.checkpoint", 2
STATE, TENSORS, POLICY = "state.json", "state.safetensors", "policy"
LAST, BEST = "last", "best"


class TorchRandom:
    """Torch's default generators, the only global ones that the trainer draws from."""

    def state_dict(self) -> dict[str, Any]:
        """States of the CPU generator and of every CUDA device's."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"cpu": torch.get_rng_state(), "cuda": list(cuda)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores them; CUDA's only where the number of devices is the same."""
        torch.set_rng_state(state["cpu"].cpu())
        if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


class Checkpoints:
    """The `checkpoints` folder of a run: `step_<n>` folders, links `last` and `best`.

    Args:
        folder: the run's `checkpoints` folder.
        parts: name to stateful object; all are saved and restored together.
        keep: newest checkpoints kept besides the best.
    """

    def __init__(self, folder: Path, parts: dict[str, Stateful], keep: int) -> None:
        self.folder, self.parts, self.keep = folder, parts, keep

    def save(self, step: int, policy: Policy, *, best: bool) -> Path:
        """Writes a checkpoint; it appears whole or not at all.

        Raises:
            UserError: the disk is full or the folder cannot be written; older ones stay.
        """
        final = self.folder / f"step_{step:09d}"
        temporary = self.folder / f".{final.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            tensors: dict[str, Tensor] = {}
            tree = _split({k: p.state_dict() for k, p in self.parts.items()}, "", tensors)
            save_file(tensors, temporary / TENSORS)
            document = {"format": FORMAT, "version": VERSION, "step": step, "state": tree}
            (temporary / STATE).write_text(json.dumps(document), encoding="utf-8")
            policy.save_pretrained(temporary / POLICY)
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
        except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(
                f"cannot write the checkpoint {final}: {error}. Older checkpoints are intact; free "
                f"some space (df -h), then continue with resume={self.folder.parent}"
            ) from error
        self._prune()
        return final

    def restore(self) -> int:
        """Loads the newest readable checkpoint into all parts; returns its step.

        Raises:
            UserError: none can be read.
        """
        problems = []
        for folder in sorted(self.folder.glob("step_*"), reverse=True):
            try:
                state, step = _read(folder)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                problems.append(f"{folder.name}: {error}")
                continue
            try:
                for name, part in self.parts.items():
                    part.load_state_dict(state[name])
            except (RuntimeError, KeyError, ValueError) as error:
                raise UserError(
                    f"{folder} does not fit this config: {error} A run continues with the "
                    "networks, heads and alpha_type that it began with; drop those overrides."
                ) from None
            return step
        detail = f" Unreadable: {'; '.join(problems)}." if problems else ""
        raise UserError(
            f"{self.folder} holds no usable checkpoint.{detail} Start the run anew (without "
            "resume=)."
        )

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


def _read(folder: Path) -> tuple[dict[str, Any], int]:
    document = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if document["format"] != FORMAT or document["version"] != VERSION:
        raise ValueError(f"format {document['format']} version {document['version']}")
    tensors = load_file(folder / TENSORS)
    return _join(document["state"], tensors), int(document["step"])


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Moves the tensors of a nested state into `tensors`, leaving references."""
    if isinstance(value, Tensor):
        name = f"{len(tensors):05d}{path}"  # the number keeps names apart whatever the keys hold
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"$tensor": name}
    if isinstance(value, dict):
        return {"$dict": [[k, _split(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return [_split(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: {type(value).__name__} is neither a tensor nor a JSON value")


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_join(v, tensors) for v in value]
    if isinstance(value, dict):
        if "$tensor" in value:
            return tensors[value["$tensor"]]
        return {k: _join(v, tensors) for k, v in value["$dict"]}
    return value


def _fsync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
