"""Stops a run at its first NaN or infinity, and keeps what caused it for inspection."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from embodied_rl.errors import RunStopped
from embodied_rl.types import PREFIX, Batch, Features

FOLDER = "failure"  # in a run folder
PENDING = 8  # updates whose batches are held until their metrics are read


@dataclass
class Update:
    """One update whose metrics nobody has read yet."""

    number: int
    env_steps: int
    batch: Batch
    metrics: dict[str, Tensor]


class Guard:
    """Checks numbers where they enter the run and where they leave the losses.

    Observations, rewards and actions are checked as they come, where they are. Losses and gradient
    norms stay on the device: they are read every 8 updates and at the end of each iteration, in
    one transfer, so every log, evaluation and checkpoint stands behind a check.

    Args:
        folder: where a failure is saved: `failure` in the run folder.
        enabled: false checks nothing.
    """

    def __init__(self, folder: Path, *, enabled: bool) -> None:
        self.folder, self.enabled = folder, enabled
        self._pending: list[Update] = []

    def check(
        self,
        when: str,
        env_steps: int,
        tensors: dict[str, Tensor],
        also: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """Checks tensors that just arrived.

        Args:
            when: what happened, for the message: "in the step of the environments".
            env_steps: environment steps so far.
            tensors: by name; integers pass.
            also: returns what to save beside them: nested dicts of tensors and JSON values.

        Raises:
            RunStopped: one holds a NaN or an infinity.
        """
        if not self.enabled or all(_finite(t) for t in tensors.values()):
            return
        self.verify()  # a bad loss, not read yet, comes before the bad action that it leads to
        self._stop(when, env_steps, tensors, {**also(), **tensors})

    def watch(self, update: Update) -> None:
        """Takes note of an update; its metrics are read later."""
        if not self.enabled:
            return
        self._pending.append(update)
        if len(self._pending) >= PENDING:
            self.verify()

    def verify(self) -> None:
        """Reads the metrics of all updates since the last call.

        Raises:
            RunStopped: a loss, a gradient norm or another metric is not finite.
        """
        updates, self._pending = self._pending, []
        values = [v for u in updates for v in u.metrics.values()]
        if not values or _finite(torch.stack(values)):
            return
        first = next(u for u in updates if not all(_finite(v) for v in u.metrics.values()))
        batch = batch_tensors(first.batch)
        facts = {"update": first.number, "metrics": {k: float(v) for k, v in first.metrics.items()}}
        when = f"in update {first.number:,}"
        self._stop(when, first.env_steps, {**batch, **first.metrics}, {**facts, **batch})

    def check_state(self, env_steps: int, state: dict[str, Any]) -> None:
        """Checks all tensors of a nested state that is about to be saved.

        Raises:
            RunStopped: one holds a NaN or an infinity.
        """
        if self.enabled:
            self.check("in the state to be saved", env_steps, dict(_leaves(state, "")))

    def _stop(
        self, when: str, env_steps: int, suspects: dict[str, Tensor], saved: dict[str, Any]
    ) -> None:
        bad = {name: count for name, t in suspects.items() if (count := _bad(t))}
        counts = ", ".join(f"{name} ({n} of {suspects[name].numel()})" for name, n in bad.items())
        message = (
            f"values that are NaN or infinite, {when} at environment step {env_steps:,}: {counts}."
        )
        facts = {"message": message, "env_steps": env_steps, "not_finite": bad}
        where = self._save(f"step_{env_steps:09d}", facts, saved)
        raise RunStopped(f"{message} {where} train.guard=false switches this check off.")

    def _save(self, name: str, facts: dict[str, Any], saved: dict[str, Any]) -> str:
        """Writes the tensors and the facts; returns a sentence that says where."""
        tensors = dict(_leaves(saved, ""))
        rest = {k: _plain(v) for k, v in saved.items() if not isinstance(v, Tensor)}
        path = self.folder / f"{name}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({k: t.detach().cpu().clone().contiguous() for k, t in tensors.items()}, path)
            text = json.dumps({**facts, **rest}, indent=2) + "\n"
            path.with_suffix(".json").write_text(text, encoding="utf-8")
        except (OSError, SafetensorError) as error:  # the finding itself matters more
            return f"They could not be saved to {self.folder}: {error}."
        return f"Saved for inspection: {path} and {name}.json."


def batch_tensors(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch by dotted name."""
    tensors: dict[str, Tensor] = {}
    for name, value in vars(batch).items():
        if isinstance(value, Features):
            stored = value.tensors().items()
            tensors |= {f"batch.{name}.{k.removeprefix(PREFIX)}": v for k, v in stored}
        elif name == "obs":  # there only where features are made anew
            tensors |= {f"batch.obs.{k}": v for k, v in (value or {}).items()}
        else:
            tensors[f"batch.{name}"] = value
    return tensors


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite; the sum, one pass, tells except where it overflows itself."""
    if not tensor.is_floating_point():
        return True
    return math.isfinite(float(tensor.sum())) or _bad(tensor) == 0


def _bad(tensor: Tensor) -> int:
    return int((~tensor.isfinite()).sum())


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{i}")


def _plain(value: Any) -> Any:
    """JSON values: tensors are in the other file, and JSON has neither NaN nor infinity."""
    if isinstance(value, Tensor):
        return None
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
