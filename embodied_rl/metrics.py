"""What a run shows and leaves behind: progress bar, TensorBoard, metrics.jsonl, results, curve."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from embodied_rl.config import Config

RECORDS = "metrics.jsonl"


class Means:
    """Running means of scalars by name; tensors are read only when asked for."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor | float]] = defaultdict(list)

    def add(self, values: dict[str, Tensor] | dict[str, float]) -> None:
        """Adds one value per name."""
        for name, value in values.items():
            self._values[name].append(value)

    def pop(self) -> dict[str, float]:
        """Returns the means and forgets the values."""
        means = {name: sum(float(v) for v in vs) / len(vs) for name, vs in self._values.items()}
        self._values.clear()
        return means

    def state_dict(self) -> dict[str, Any]:
        """All values since the last `pop`, [n] per name, in the precision that `pop` sums in."""
        return {
            name: torch.tensor([float(v) for v in values], dtype=torch.float64)
            for name, values in self._values.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores them."""
        self._values.clear()
        self._values.update({name: values.tolist() for name, values in state.items()})


class Logger:
    """Writes scalars to TensorBoard and `metrics.jsonl`, and keeps the progress bar.

    Its checkpointed state is the length of `metrics.jsonl`, to which `open` cuts the file back:
    after a resume no record is lost, and none is there twice.

    Args:
        folder: the run folder.
        total_steps: environment steps of the whole run.
        shown: false: nothing is printed or written, for all processes of a run but the first.
    """

    def __init__(self, folder: Path, total_steps: int, *, shown: bool = True) -> None:
        self._folder, self._total, self._visible = folder, total_steps, shown
        self._path = folder / RECORDS
        self._board: SummaryWriter | None = None
        self._length: int | None = None  # bytes that a checkpoint stands behind

    def open(self, step: int) -> None:
        """Starts recording after `step`; what a checkpoint does not know of is dropped."""
        length = self._length or 0
        if self._path.exists() and self._path.stat().st_size > length:
            os.truncate(self._path, length)
        purge = 0 if self._length is None else step + 1
        if self._visible:
            self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=purge)
        self._bar = tqdm(
            total=self._total,
            initial=step,
            disable=not self._visible,
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            smoothing=0.05,
        )
        self._shown: dict[str, str] = {}
        self._opened = time.monotonic()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records scalars at an environment step."""
        if self._board is None:
            return
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def show(self, step: int, **values: str) -> None:
        """Moves the bar to `step` and updates the figures beside it."""
        self._shown |= values
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def say(self, message: str) -> None:
        """Prints a line without tearing the bar."""
        if self._visible:
            self._bar.write(message, file=sys.stdout)
            sys.stdout.flush()

    def state_dict(self) -> dict[str, Any]:
        """Forces what was recorded to disk, and returns its length in bytes."""
        if self._board is not None:
            self._board.flush()
        length = 0
        if self._path.exists():
            with self._path.open("rb") as file:
                os.fsync(file.fileno())
                length = os.fstat(file.fileno()).st_size
        return {"length": length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes note of the length; `open` cuts the file."""
        self._length = state["length"]

    def close(self) -> None:
        """Ends the bar and the writers."""
        self._bar.close()
        if self._board is not None:
            self._board.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads `metrics.jsonl`; a line cut off by a crash is left out."""
    records: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return records


def write_results(folder: Path, results: dict[str, Any], config: Config, seed: int) -> None:
    """Writes `results.json` into a run's folder, and draws its curve; `seed` is the run's."""
    path = folder / "results.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    title = f"{config.env.name}, {config.algorithm.q_head_type}"
    plot_curve(folder, f"{title}, seed {seed}", config.eval.metric)


def plot_curve(folder: Path, title: str, metric: str) -> Path:
    """Draws evaluations over environment steps as `learning_curve.png`; returns its path.

    Args:
        folder: the run folder.
        title: of the picture.
        metric: `return` draws the return, anything else both success rates.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = [r for r in read_records(folder / RECORDS) if "eval/success_once" in r]
    steps = [r["step"] for r in records]
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    names = ["return"] if metric == "return" else ["success_once", "success_at_end"]
    scale = 1 if metric == "return" else 100
    for name in names:
        values = [scale * r[f"eval/{name}"] for r in records]
        axis.plot(steps, values, marker="o", label=name.replace("_", " "))
        if values:
            axis.axhline(values[0], ls="--", lw=1, c="grey")
    axis.set(xlabel="environment steps (dashed: before finetuning)", title=title)
    if metric == "return":
        axis.set(ylabel="return")
    else:
        axis.set(ylabel="success rate, %", ylim=(-2, 102))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    path = folder / "learning_curve.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
