"""Trajectories on disk: segments in safetensors, an index in JSON lines.

    <folder>/index.jsonl            one line per segment: file, lengths, bytes, CRC-32
    <folder>/segment-000000.safetensors
    <folder>/meta.json              format version and what made the features

A segment concatenates the rows of its trajectories (T + 1 each) per field. It is written under a
temporary name, fsynced and renamed before its index line is appended, so a crash loses at most
the trajectories that were not yet flushed.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from embodied_rl.errors import UserError
from embodied_rl.types import Trajectory

FORMAT, VERSION = "embodied_rl.replay", 1
INDEX, META = "index.jsonl", "meta.json"


@dataclass
class Segment:
    """One file: its name, its trajectories' lengths T, and what it should hash to.

    A lost file keeps its entry, so that the numbers of later trajectories do not shift.
    """

    file: str
    lengths: list[int]
    size: int
    crc32: int


@dataclass
class Place:
    """Where a trajectory lies: its segment (None while unflushed), first row and length.

    The length is 0 for a trajectory whose file was lost.
    """

    segment: int | None
    row: int
    length: int


class TrajectoryStore:
    """An append-only store of trajectories, numbered from 0.

    Args:
        folder: created if absent.
        segment_size: trajectories per file.
        meta: JSON values that every trajectory shares (the backbone's fingerprint).

    Raises:
        UserError: the folder is another format or version, or belongs to another `meta`.
    """

    def __init__(self, folder: Path, segment_size: int, meta: dict[str, Any]) -> None:
        self.folder = folder
        self.segment_size = segment_size
        self.problems: list[str] = []  # what opening had to leave out
        self._segments: list[Segment] = []
        self._places: list[Place] = []
        self._pending: list[Trajectory] = []
        self._open_files: dict[int, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.tmp"):
            leftover.unlink()
        self._check_meta(meta)
        self._read_index()

    def __len__(self) -> int:
        return len(self._places)

    def length(self, number: int) -> int:
        """T of trajectory `number`."""
        return self._places[number].length

    def append(self, trajectory: Trajectory) -> int:
        """Adds a trajectory; returns its number. Written to disk once a segment is full."""
        row = sum(t.length + 1 for t in self._pending)
        self._pending.append(trajectory)
        self._places.append(Place(None, row, trajectory.length))
        number = len(self._places) - 1
        if len(self._pending) >= self.segment_size:
            self.flush()
        return number

    def flush(self) -> None:
        """Writes the trajectories that are not on disk yet as one segment.

        Raises:
            UserError: the disk is full or the folder cannot be written; nothing is lost in memory.
        """
        if not self._pending:
            return
        number = len(self._segments)
        name = f"segment-{number:06d}.safetensors"
        names = self._pending[0].fields
        merged = {k: torch.cat([t.fields[k] for t in self._pending]).contiguous() for k in names}
        temporary = self.folder / f"{name}.tmp"
        try:
            save_file(merged, temporary)
            _fsync(temporary)
            size, crc = temporary.stat().st_size, _crc32(temporary)
            temporary.rename(self.folder / name)
            segment = Segment(name, [t.length for t in self._pending], size, crc)
            with (self.folder / INDEX).open("a", encoding="utf-8") as index:
                index.write(json.dumps(vars(segment)) + "\n")
                index.flush()
                os.fsync(index.fileno())
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"cannot write replay to {self.folder}: {error}. Free some space (df -h), then "
                "continue from the last checkpoint with resume=<run folder>."
            ) from error
        for place in self._places[-len(self._pending) :]:
            place.segment = number
        self._segments.append(segment)
        self._pending.clear()

    def read(self, number: int, names: list[str] | None = None) -> dict[str, Tensor]:
        """Returns fields of one trajectory, T + 1 rows each, through a memory map."""
        place = self._places[number]
        return self.read_rows(number, 0, place.length + 1, names)

    def read_rows(
        self, number: int, start: int, stop: int, names: list[str] | None = None
    ) -> dict[str, Tensor]:
        """Returns rows [start, stop) of one trajectory's fields."""
        place = self._places[number]
        if place.segment is None:
            fields = self._pending[number - (len(self._places) - len(self._pending))].fields
            return {k: fields[k][start:stop] for k in names or fields}
        file = self._open_files.get(place.segment)
        if file is None:
            path = self.folder / self._segments[place.segment].file
            file = self._open_files[place.segment] = safe_open(path, framework="pt")
        rows = slice(place.row + start, place.row + stop)
        return {k: file.get_slice(k)[rows] for k in names or file.keys()}

    def truncate(self, count: int) -> None:
        """Forgets every trajectory from number `count` on (a resume goes back to a checkpoint).

        Raises:
            UserError: `count` is more than the store holds, or lies inside a segment.
        """
        if count > len(self._places):
            raise UserError(
                f"{self.folder} holds {len(self._places)} trajectories, the checkpoint counts "
                f"{count}. {' '.join(self.problems)}"
            )
        self.flush()
        kept, total = 0, 0
        while total < count:
            total += len(self._segments[kept].lengths)
            kept += 1
        if total != count:
            raise UserError(f"{self.folder}: trajectory {count} is inside a segment.")
        dropped = self._segments[kept:]
        self._segments, self._places = self._segments[:kept], self._places[:count]
        self._write_index()
        self._open_files.clear()
        for segment in dropped:
            (self.folder / segment.file).unlink(missing_ok=True)

    def _write_index(self) -> None:
        temporary = self.folder / f"{INDEX}.tmp"
        lines = "".join(json.dumps(vars(s)) + "\n" for s in self._segments)
        temporary.write_text(lines, encoding="utf-8")
        _fsync(temporary)
        temporary.rename(self.folder / INDEX)

    def _check_meta(self, meta: dict[str, Any]) -> None:
        path = self.folder / META
        wanted = {"format": FORMAT, "version": VERSION, **meta}
        if not path.exists():
            temporary = path.with_suffix(".json.tmp")
            temporary.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
            temporary.rename(path)
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        for key in ("format", "version", *meta):
            if found.get(key) != wanted[key]:
                raise UserError(
                    f"{self.folder} was written with {key}={found.get(key)!r}, this run has "
                    f"{wanted[key]!r}. Use another run_dir."
                )

    def _read_index(self) -> None:
        path = self.folder / INDEX
        if not path.exists():
            return
        torn = False
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                segment = Segment(**json.loads(line))
            except (ValueError, TypeError):
                self.problems.append(f"index line unreadable: {line[:60]!r}.")
                torn = True
                continue
            file = self.folder / segment.file
            lost = f"{len(segment.lengths)} trajectories are lost."
            usable = file.exists()
            if not usable:
                self.problems.append(f"{segment.file} is missing: {lost}")
            elif file.stat().st_size != segment.size or _crc32(file) != segment.crc32:
                usable = False
                file.rename(file.with_suffix(".corrupt"))
                self.problems.append(f"{segment.file} is corrupt, renamed to .corrupt: {lost}")
            row = 0
            for length in segment.lengths:
                self._places.append(Place(len(self._segments), row, length if usable else 0))
                row += length + 1
            self._segments.append(segment)
        if torn:  # the next line would otherwise be appended to the torn one
            self._write_index()


def read_all(folder: Path) -> list[Trajectory]:
    """Reads every trajectory of a store into memory.

    Raises:
        UserError: the folder is no trajectory store.
    """
    if not (folder / META).is_file():
        raise UserError(f"{folder} holds no {META}, so it is not a trajectory folder.")
    store = TrajectoryStore(folder, segment_size=1, meta={})
    if store.problems:
        raise UserError(f"{folder} is damaged: {' '.join(store.problems)} Copy it again.")
    return [Trajectory(store.read(i)) for i in range(len(store))]


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc
