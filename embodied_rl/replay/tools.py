"""Stores on disk: what they hold, whether they are intact, one out of many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embodied_rl.errors import UserError
from embodied_rl.replay.meta import FORMAT, META, VERSION
from embodied_rl.replay.reader import StoreReader
from embodied_rl.types import Trajectory

INSIDE = ("replay", "demos")  # where a run folder and a policy folder keep their store
OUTCOME = ("reward", "success", "steps")


def find_store(path: Path) -> Path:
    """Returns the store at `path`, or the one of a run or policy folder there.

    Raises:
        UserError: there is none.
    """
    for folder in (path, *(path / name for name in INSIDE)):
        if (folder / META).is_file():
            return folder
    what = "holds no store (meta.json)" if path.is_dir() else "is no folder"
    raise UserError(
        f"{path} {what}, neither itself nor in replay/ or demos/. Name a run folder, a store or a "
        "demonstration folder; python -m embodied_rl.replay import reads other formats."
    )


def held(reader: StoreReader) -> list[int]:
    """Numbers of the trajectories that are there, oldest first."""
    return [n for n in range(reader.first, len(reader)) if reader.length(n)]


def read_held(
    reader: StoreReader, number: int, names: Sequence[str] | None = None
) -> dict[str, Tensor] | None:
    """Reads a trajectory; None if it is damaged, or was evicted by a run that writes meanwhile."""
    try:
        return reader.read(number, names)
    except UserError:
        damaged = not reader.length(number)
        if damaged or number < StoreReader(reader.folder).first:
            return None
        raise


def inspect(folder: Path, newest: int | None) -> str:
    """Returns a table of what a store holds; changes nothing on disk.

    Args:
        folder: the store.
        newest: success and return are those of so many newest trajectories; None: of all.
    """
    reader = StoreReader(folder)
    numbers = held(reader)
    lost = len(reader) - reader.first - len(numbers)
    shared = {k: v for k, v in reader.meta.items() if k not in ("format", "version")}
    rows = [("format", f"{FORMAT} version {VERSION}"), *((k, str(v)) for k, v in shared.items())]
    span = f" (numbers {reader.first} to {len(reader) - 1})" if numbers else ""
    rows.append(("trajectories", f"{len(numbers):,}{span}" + (f", {lost} lost" if lost else "")))
    lengths = reader.lengths[numbers] if numbers else None
    if lengths is not None:
        spread = f"{lengths.min()} / {lengths.mean():.1f} / {lengths.max()} (min / mean / max)"
        rows += [("transitions", f"{lengths.sum():,}"), ("length", spread)]
    files = sum(s.first + len(s.lengths) > reader.first for s in reader.segments)
    rows.append(("on disk", f"{reader.nbytes / 1e6:,.1f} MB in {files} segments"))
    fields: list[tuple[str, str]] = []
    if numbers:
        rows += _outcomes(reader, numbers if newest is None else numbers[-newest:])
        latest = next(filter(None, (read_held(reader, n) for n in reversed(numbers))), {})
        fields = [(k, f"{_dtype(v):<8} {list(v.shape[1:])}") for k, v in latest.items()]
    width = max(len(name) for name, _ in rows + fields)
    lines = [str(folder), *(f"  {name:<{width}}  {value}" for name, value in rows)]
    if fields:
        lines += ["fields of a row", *(f"  {name:<{width}}  {value}" for name, value in fields)]
    lines += ["problems", *(f"  {p}" for p in reader.problems)] if reader.problems else []
    reader.close()
    return "\n".join(lines)


def _outcomes(reader: StoreReader, numbers: list[int]) -> list[tuple[str, str]]:
    once, at_end, returns, steps = 0, 0, [], 0
    for number in numbers:
        rows = read_held(reader, number, OUTCOME)
        if rows is None:
            continue
        success = rows["success"][:-1]
        once, at_end = once + bool(success.any()), at_end + bool(success[-1])
        returns.append(float(rows["reward"][:-1].sum()))
        steps += int(rows["steps"][:-1].sum())
    count = len(returns)
    if not count:
        return []
    shares = f"{once / count:.1%} at some step, {at_end / count:.1%} at the last"
    spread = f"{min(returns):.2f} / {sum(returns) / count:.2f} / {max(returns):.2f}"
    which = f" (newest {count:,})" if count < len(held(reader)) else ""
    return [
        ("environment steps", f"{steps:,}{which}"),
        ("success rate", shares + which),
        ("return", f"{spread} (min / mean / max){which}"),
    ]


def verify(folder: Path) -> tuple[list[str], str]:
    """Reads everything; returns a line per damaged piece and a summary."""
    reader = StoreReader(folder)
    damaged = reader.verify()
    summary = (
        f"{folder}: {len(held(reader)):,} trajectories, {reader.nbytes / 1e6:,.1f} MB read: "
        f"{f'{len(damaged)} damaged' if damaged else 'all intact'}."
    )
    reader.close()
    return damaged, summary


@dataclass
class Selection:
    """Trajectories of some stores, in the order of the stores.

    Attributes:
        meta: what all the stores share.
        picked: reader and number of each trajectory.
        problems: what had to be left out; complete once all were read.
    """

    meta: dict[str, Any]
    picked: list[tuple[StoreReader, int]]
    problems: list[str]

    def __iter__(self) -> Iterator[Trajectory]:
        for reader, number in self.picked:
            fields = read_held(reader, number)
            if fields is not None:
                yield Trajectory(fields)
        for reader in dict.fromkeys(r for r, _ in self.picked):
            self.problems += [f"{reader.folder}: {p}" for p in reader.problems]


def select(folders: Sequence[Path], *, successful: bool, newest: int | None) -> Selection:
    """Picks trajectories.

    Args:
        folders: stores with the same fields and the same description.
        successful: only those in which success held at some step.
        newest: only the last so many of these; None: all.

    Raises:
        UserError: the stores do not belong together, or nothing is left.
    """
    readers = [StoreReader(folder) for folder in folders]
    _check_alike(readers)
    everything = [(r, n) for r in readers for n in held(r)]
    picked: list[tuple[StoreReader, int]] = []
    for reader, number in reversed(everything):
        if newest is not None and len(picked) >= newest:
            break
        rows = read_held(reader, number, ["success"]) if successful else {}
        if rows is not None and (not successful or bool(rows["success"].any())):
            picked.append((reader, number))
    if not picked:
        names = ", ".join(map(str, folders))
        filtered = " that succeeded; set successful=false" if successful and everything else ""
        raise UserError(f"{names}: no trajectory there{filtered}.")
    return Selection(readers[0].meta, picked[::-1], [])


def _check_alike(readers: list[StoreReader]) -> None:
    """Raises UserError where descriptions or fields of the stores differ."""
    first, *others = readers
    for other in others:
        for name in {**first.meta, **other.meta}:
            a, b = (r.meta.get(name) for r in (first, other))
            if a != b:
                raise UserError(
                    f"{other.folder} does not go with {first.folder}: {name}={b!r} there, "
                    f"{name}={a!r} here. Merge stores of the same task and policy only."
                )
    specs = [(r, _spec(r)) for r in readers]
    filled = [(r, s) for r, s in specs if s]
    for reader, spec in filled[1:]:
        known = filled[0][1]
        odd = [n for n in sorted({*known, *spec}) if known.get(n) != spec.get(n)]
        if odd:
            a, b = (s.get(odd[0], "absent") for s in (known, spec))
            raise UserError(
                f"{reader.folder} does not go with {filled[0][0].folder}: {odd[0]} is {b} there, "
                f"{a} here (different: {', '.join(odd)}). Merge stores with the same fields only."
            )


def _spec(reader: StoreReader) -> dict[str, str]:
    """Field to dtype and shape of a row; empty for an empty store."""
    for number in reversed(held(reader)):
        rows = read_held(reader, number)
        if rows is not None:
            return {name: f"{_dtype(v)} {list(v.shape[1:])}" for name, v in rows.items()}
    return {}


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
