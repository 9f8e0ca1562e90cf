"""Reading a trajectory store without ever changing it.

    <folder>/meta.json                       format, version, and what all share (`meta.py`)
    <folder>/index.jsonl                     one line per event (`index.py`)
    <folder>/segment-000000000.safetensors   named by its first trajectory (`segment.py`)

docs/replay_format.md describes the format for other readers.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from embodied_rl.errors import UserError
from embodied_rl.replay.column import Column
from embodied_rl.replay.damage import CORRUPT, DamagedError, LostError
from embodied_rl.replay.index import Index, Listed, read_index
from embodied_rl.replay.meta import read_meta
from embodied_rl.replay.open_segments import OpenSegments
from embodied_rl.replay.segment import SegmentFile
from embodied_rl.types import Trajectory

AHEAD = 4096  # bytes of a row from which on the kernel is asked to read ahead
NOWHERE = -1


class StoreReader:
    """Trajectories of a folder, numbered from 0, read through memory maps.

    Safe while another process writes: what it published before this reader opened is there, until
    it is evicted. Each trajectory's checksum is verified the first time that it is read.

    Args:
        folder: of the store.

    Raises:
        UserError: the folder is no store, or one of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []  # what was left out, one line each
        self.segments: list[Listed] = []  # an evicted one stays listed
        self.first = 0  # trajectories below are evicted
        self._lengths, self._segment, self._row = Column(), Column(), Column()
        self._verified = Column()
        self._files = OpenSegments(folder)
        self._names: list[str] = []
        self._lock = threading.RLock()  # prefetching reads from a thread of its own
        self.meta = read_meta(folder)
        index = self._load()
        if any(not (folder / s.file).exists() for s in self.segments if not self._gone(s)):
            index = self._load()  # a writer may have evicted between index and files
        self._index = index

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> np.ndarray:
        """T of every trajectory, int64; 0 for a lost one, and for an evicted one what it had."""
        return self._lengths.values

    @property
    def nbytes(self) -> int:
        """Bytes of the segments that are not evicted."""
        return sum(s.size for s in self.segments if not self._gone(s))

    def length(self, number: int) -> int:
        """T of trajectory `number`, 0 if it is lost."""
        return int(self._lengths.values[number])

    @property
    def field_names(self) -> list[str]:
        """Fields of the trajectories; empty where there is none."""
        if not self._names:
            held = np.flatnonzero(self.lengths[self.first :])
            if len(held):
                self._names = self._file(int(self._segment.values[self.first + held[-1]])).names
        return self._names

    def row_bytes(self, number: int, names: Sequence[str]) -> int:
        """Bytes of one row of some fields of trajectory `number`, uncompressed."""
        file = self._file(int(self._segment.values[number]))
        return sum(file.row_bytes(name) for name in names)

    def read(self, number: int, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Returns fields of one trajectory, [T + 1, ...] each.

        Raises:
            UserError: it is lost or evicted.
        """
        if not self.first <= number < len(self) or not self.length(number):
            raise UserError(
                f"{self.folder}: trajectory {number} is not there (held: {self.first} to "
                f"{len(self) - 1}). {' '.join(self.problems)}"
            )
        rows = np.arange(self.length(number) + 1)
        try:
            return self.gather(np.full(len(rows), number), rows, names)
        except LostError:
            raise UserError(f"{self.folder}: {self.problems[-1]}") from None

    def gather(
        self, numbers: np.ndarray, offsets: np.ndarray, names: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Returns one row each of many trajectories.

        Args:
            numbers: [B] trajectories.
            offsets: [B] row in each.
            names: fields; None for all.

        Returns:
            Fields [B, ...].

        Raises:
            LostError: some of the trajectories are damaged; they are left out from then on.
        """
        with self._lock:
            self._verify_now(np.unique(numbers))
            segments = self._segment.values[numbers]
            order = np.argsort(segments, kind="stable")  # one segment after the other
            rows = (self._row.values[numbers] + offsets)[order]
            cuts = np.flatnonzero(np.diff(segments[order])) + 1
            spans = list(zip([0, *cuts], [*cuts, len(order)], strict=True))
            files = [self._file(int(segments[order[a]])) for a, _ in spans]
            out: dict[str, Tensor] = {}
            for name in files[0].names if names is None else names:
                for file, (a, b) in zip(files, spans, strict=True):
                    file.will_need(name, rows[a:b], AHEAD)
                dtype, shape = files[0].spec(name)
                packed = np.empty((len(rows), *shape), dtype)
                for file, (a, b) in zip(files, spans, strict=True):
                    file.take(name, rows[a:b], packed[a:b])
                if len(spans) > 1:
                    unsorted = np.empty_like(packed)
                    unsorted[order] = packed
                    packed = unsorted
                out[name] = torch.from_numpy(packed)
            return out

    def verify(self) -> list[str]:
        """Reads everything; returns one line for each damaged trajectory or segment."""
        found = list(self.problems)
        for position, segment in enumerate(self.segments):
            known = not np.any(self._segment.values[self.lengths > 0] == position)
            if known or self._gone(segment):
                continue  # none of its trajectories is left, and the problems say so
            try:
                file = SegmentFile(self.folder / segment.file)
            except (DamagedError, FileNotFoundError) as error:
                found.append(f"{segment.file} is damaged: {error}.")
                continue
            for k in range(len(segment.lengths)):
                number = segment.first + k
                if number not in self._index.lost and not file.intact(k):
                    found.append(_damaged(number, segment.file))
        return list(dict.fromkeys(found))

    def close(self) -> None:
        """Lets go of the files."""
        self._files.clear()

    def _file(self, segment: int) -> SegmentFile:
        return self._files.get(segment, self.segments[segment].file)

    def _verify_now(self, numbers: np.ndarray) -> None:
        """Checks trajectories that were not read before."""
        damaged = []
        for number in numbers[self._verified.values[numbers] == 0].tolist():
            segment = int(self._segment.values[number])
            listed = self.segments[segment]
            try:
                intact = self._file(segment).intact(number - listed.first)
            except DamagedError:
                intact = False
            if intact:
                self._verified.values[number] = 1
            else:
                damaged.append(number)
                self._lose(number, _damaged(number, listed.file))
        if damaged:
            raise LostError(damaged)

    def _lose(self, number: int, reason: str) -> None:
        """Leaves a trajectory out from now on."""
        if self._lengths.values[number]:  # prefetched batches may come upon it again
            self._lengths.values[number] = 0
            self.problems.append(reason)

    def _gone(self, segment: Listed) -> bool:
        return segment.first + len(segment.lengths) <= self.first

    def _load(self) -> Index:
        """Reads the index and matches it with the segments that are there."""
        index = read_index(self.folder)
        self.problems = []
        self.segments = []
        self._lengths, self._segment, self._row = Column(), Column(), Column()
        self._verified = Column()
        self.first = index.evicted
        files = {p.name for p in self.folder.glob("segment-*.safetensors")}
        for name in sorted({*index.segments, *files}):
            self._adopt(name, index, name in files)
        for number, reason in index.lost.items():
            if number < len(self) and self.length(number):
                StoreReader._lose(self, number, reason)  # a writer has it on record already
        return index

    def _adopt(self, name: str, index: Index, there: bool) -> None:
        """Takes a segment up, or books its trajectories as lost."""
        listed, reason = index.segments.get(name), "is missing"
        opened = None
        if there:
            try:
                opened = SegmentFile(self.folder / name)
                info = opened.info
                listed = Listed(name, info.first, info.lengths, info.size)
            except DamagedError as error:
                reason = f"is damaged: {error}"
        if listed is None:  # neither line nor header: the next segment's number tells the gap
            self.problems.append(f"{name} {reason}: its trajectories are lost.")
            return
        if listed.first + len(listed.lengths) <= self.first:
            reason = ""  # evicted
        elif not there and (self.folder / name).with_suffix(CORRUPT).exists():
            reason = f"was damaged and is set aside as {Path(name).with_suffix(CORRUPT)}"
        while len(self) < listed.first:
            self._place(NOWHERE, 0, 0)
        position = len(self.segments)
        self.segments.append(listed)
        for k, length in enumerate(listed.lengths):
            row = opened.start(k) if opened is not None else 0
            self._place(position, row, length if opened is not None else 0)
        if opened is None and reason:
            lost = f"{len(listed.lengths)} trajectories are lost."
            self.problems.append(f"{name} {reason}: {lost}")

    def _place(self, segment: int, row: int, length: int) -> None:
        self._segment.append(segment)
        self._row.append(row)
        self._lengths.append(length)
        self._verified.append(0)


def read_all(folder: Path) -> list[Trajectory]:
    """Reads every trajectory of a store into memory.

    Raises:
        UserError: the folder is no trajectory store, or a damaged one.
    """
    reader = StoreReader(folder)
    trajectories = []
    if not reader.problems:
        numbers = [n for n in range(reader.first, len(reader)) if reader.length(n)]
        trajectories = [Trajectory(reader.read(n)) for n in numbers]
    if reader.problems:
        raise UserError(f"{folder} is damaged: {' '.join(reader.problems)} Copy it again.")
    return trajectories


def _damaged(number: int, file: str) -> str:
    return f"trajectory {number} in {file} is damaged (its checksum differs): it is left out."
