"""Writing a trajectory store; `reader.py` says what a folder holds.

A segment is written under a temporary name, synced and renamed, then its index line is appended: a
crash at any byte loses at most the trajectories that were not yet flushed.
"""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied_rl.errors import UserError
from embodied_rl.replay.codec import Compressor
from embodied_rl.replay.damage import CORRUPT
from embodied_rl.replay.index import Listed, append_event, segment_event, write_index
from embodied_rl.replay.meta import write_meta
from embodied_rl.replay.reader import NOWHERE, StoreReader
from embodied_rl.replay.segment import write_segment
from embodied_rl.types import Trajectory

LOCK = ".lock"
SEGMENT_BYTES = 64 * 2**20  # a segment is written once it holds this much, however few trajectories
COMPRESSION = ("none", "zstd")


class TrajectoryStore(StoreReader):
    """A store that one process appends to; others may read it meanwhile.

    Args:
        folder: created if absent.
        segment_size: trajectories per file.
        meta: JSON values that every trajectory shares (the backbone's fingerprint).
        max_bytes: budget of the segments; the oldest are evicted beyond it. None: no bound.
        compression: none, or zstd for image fields (uint8 with two or more axes).

    Raises:
        UserError: another format, version or `meta`; another process writes to it; not writable.
    """

    def __init__(
        self,
        folder: Path,
        segment_size: int,
        meta: dict[str, Any],
        *,
        max_bytes: int | None = None,
        compression: str = "none",
    ) -> None:
        self.segment_size, self.max_bytes = segment_size, max_bytes
        self._compressor = Compressor() if compression == "zstd" else None
        self._pending: list[Trajectory] = []
        self._pending_bytes = 0
        self._keep_from: int | None = None
        self._evicted_upto = 0  # position in `segments`: those before are evicted
        self._deleted_upto = 0  # and those before this are deleted too
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._held = _hold(folder)
            for leftover in folder.glob("*.tmp"):
                leftover.unlink()
            write_meta(folder, meta)
        except OSError as error:
            raise _unwritable(folder, error) from error
        super().__init__(folder)
        self._check_meta(meta)
        self._set_aside()

    @property
    def field_names(self) -> list[str]:
        """Fields of the trajectories; empty where there is none."""
        return list(self._pending[0].fields) if self._pending else super().field_names

    def append(self, trajectory: Trajectory) -> int:
        """Adds a trajectory; returns its number. Written to disk once a segment is full.

        Raises:
            UserError: the disk is full or the folder cannot be written; nothing is lost in memory.
        """
        with self._lock:
            row = sum(t.length + 1 for t in self._pending)
            self._pending.append(trajectory)
            self._pending_bytes += trajectory.nbytes
            self._place(NOWHERE, row, trajectory.length)
            self._verified.values[-1] = 1
            number = len(self) - 1
            if len(self._pending) >= self.segment_size or self._pending_bytes >= SEGMENT_BYTES:
                self.flush()
        return number

    def flush(self) -> None:
        """Writes the trajectories that are not on disk yet as one segment, then evicts.

        Raises:
            UserError: the disk is full or the folder cannot be written; nothing is lost in memory.
        """
        with self._lock:
            if not self._pending:
                return
            first = len(self) - len(self._pending)
            path = self.folder / f"segment-{first:09d}.safetensors"
            try:
                segment = write_segment(path, first, self._pending, self._compressor)
                listed = Listed(segment.file, first, segment.lengths, segment.size)
                append_event(self.folder, segment_event(listed))
            except OSError as error:
                path.unlink(missing_ok=True)
                raise _unwritable(self.folder, error) from error
            self._index.segments[listed.file] = listed
            self._segment.values[first:] = len(self.segments)
            self.segments.append(listed)
            self._pending, self._pending_bytes = [], 0
            self._evict()

    def keep_from(self, number: int) -> None:
        """Says that a checkpoint needs the trajectories from `number` on.

        Evicted ones among them leave the sampling window at once, and the disk at a later call.
        """
        with self._lock:
            self._keep_from = number
            self._delete_evicted()

    def go_back(self, first: int, count: int) -> None:
        """Returns to the trajectories [first, count) that a checkpoint spoke of.

        Raises:
            UserError: `count` is more than the store holds, or lies inside a segment.
        """
        with self._lock:
            if count > len(self):
                raise UserError(
                    f"{self.folder} holds {len(self)} trajectories, the checkpoint counts "
                    f"{count}. {' '.join(self.problems)}"
                )
            self.flush()
            kept = [s for s in self.segments if s.first < count]
            if kept and kept[-1].first + len(kept[-1].lengths) > count:
                raise UserError(f"{self.folder}: trajectory {count} is inside a segment.")
            for segment in reversed(self.segments[len(kept) :]):  # newest first: no gap on a crash
                (self.folder / segment.file).unlink(missing_ok=True)
            self.segments = kept
            self._index.segments = {s.file: s for s in kept}
            self._index.lost = {n: r for n, r in self._index.lost.items() if n < count}
            write_index(self.folder, self._index)
            for column in (self._lengths, self._segment, self._row, self._verified):
                column.truncate(count)
            self._files.clear()
            self._evicted_upto = sum(s.first + len(s.lengths) <= first for s in kept)
            self.first = max(first, self._index.evicted)

    def gather(
        self, numbers: np.ndarray, offsets: np.ndarray, names: Any = None
    ) -> dict[str, Tensor]:
        """Returns one row each of many trajectories, as the reader does; unflushed ones too."""
        with self._lock:
            held = len(self) - len(self._pending)
            fresh = numbers >= held
            if not fresh.any():
                return super().gather(numbers, offsets, names)
            fields = list(self._pending[0].fields) if names is None else names
            old = None
            if not fresh.all():
                old = super().gather(numbers[~fresh], offsets[~fresh], fields)
            index = torch.from_numpy(np.flatnonzero(fresh))
            out: dict[str, Tensor] = {}
            for name in fields:
                rows = torch.stack(
                    [
                        self._pending[int(n) - held].fields[name][int(o)]
                        for n, o in zip(numbers[fresh], offsets[fresh], strict=True)
                    ]
                ).cpu()
                if old is None:
                    out[name] = rows
                    continue
                out[name] = rows.new_empty((len(numbers), *rows.shape[1:]))
                out[name][index] = rows
                out[name][torch.from_numpy(~fresh)] = old[name]
            return out

    def close(self) -> None:
        """Writes what is pending and lets go of the folder."""
        self.flush()
        super().close()
        self._held.close()

    def _lose(self, number: int, reason: str) -> None:
        super()._lose(number, reason)
        if number not in self._index.lost:
            self._index.lost[number] = reason
            append_event(self.folder, {"lost": [number, reason]})

    def _evict(self) -> None:
        """Drops the oldest segments beyond the budget, always keeping the newest one."""
        if self.max_bytes is None:
            return
        held = sum(s.size for s in self.segments[self._evicted_upto :])
        while held > self.max_bytes and self._evicted_upto < len(self.segments) - 1:
            oldest = self.segments[self._evicted_upto]
            held -= oldest.size
            self._evicted_upto += 1
            self.first = oldest.first + len(oldest.lengths)
        self._delete_evicted()

    def _delete_evicted(self) -> None:
        stop = self._deleted_upto
        while stop < self._evicted_upto and self._releasable(self.segments[stop]):
            stop += 1
        doomed = self.segments[self._deleted_upto : stop]
        if not doomed:
            return
        self._index.evicted = doomed[-1].first + len(doomed[-1].lengths)
        append_event(self.folder, {"evicted": self._index.evicted})
        for position, segment in enumerate(doomed, self._deleted_upto):
            self._files.drop(position)
            (self.folder / segment.file).unlink(missing_ok=True)
            self._index.segments.pop(segment.file, None)
        self._deleted_upto = stop

    def _releasable(self, segment: Listed) -> bool:
        end = segment.first + len(segment.lengths)
        return self._keep_from is None or end <= self._keep_from

    def _check_meta(self, meta: dict[str, Any]) -> None:
        for key, wanted in meta.items():
            found = self.meta.get(key)
            if found != wanted:
                raise UserError(
                    f"{self.folder} was written with {key}={found!r}, this run has {wanted!r}. "
                    "Use another run_dir."
                )

    def _set_aside(self) -> None:
        """Renames damaged segments, deletes evicted ones and mends the index."""
        readable = {s.file for s in self.segments if self._readable(s)}
        for path in self.folder.glob("segment-*.safetensors"):
            if path.name not in readable:
                path.rename(path.with_suffix(CORRUPT))
        gone = [s for s in self.segments if self._gone(s)]
        for segment in gone:
            (self.folder / segment.file).unlink(missing_ok=True)
        self._evicted_upto = self._deleted_upto = len(gone)
        present = {s.file: s for s in self.segments[len(gone) :]}
        if self._index.damaged_lines or list(present) != list(self._index.segments):
            self._index.segments, self._index.damaged_lines = present, 0
            write_index(self.folder, self._index)

    def _readable(self, segment: Listed) -> bool:
        numbers = range(segment.first, segment.first + len(segment.lengths))
        return self._gone(segment) or any(
            self._lengths.values[n] or n in self._index.lost for n in numbers
        )


def _hold(folder: Path) -> Any:
    """Holds the folder's lock for as long as the returned file is open."""
    file = (folder / LOCK).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"{folder} is being written by another process. Wait for that run to end, or use "
            "another run_dir."
        ) from None
    return file


def _unwritable(folder: Path, error: BaseException) -> UserError:
    return UserError(
        f"cannot write replay to {folder}: {error}. Free some space (df -h) or make it writable, "
        "then continue from the last checkpoint with resume=<run folder>."
    )
