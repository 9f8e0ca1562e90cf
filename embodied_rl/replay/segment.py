"""One file of trajectories: written once, then read through a memory map.

A segment is a safetensors file. Each field is one array with the rows of all its trajectories one
after another (T + 1 each), or, compressed, the zstd frames of its rows one after another
(`<field>`, uint8) with the bounds of each row's frame (`<field>#bounds`, int64, rows + 1).

The header's `__metadata__` holds, as one JSON string `segment`, the number of the first trajectory,
the lengths T, a CRC-32 for each trajectory over the stored bytes of its rows, field by field in
the order of their names, and what is compressed; and as `check` the CRC-32 of that string and of
the header's table of fields, so that a segment explains and proves itself.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from embodied_rl.manifest import sync
from embodied_rl.replay.codec import Compressor, decompress
from embodied_rl.replay.damage import DamagedError
from embodied_rl.types import Trajectory

BOUNDS = "#bounds"
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
PAGE = mmap.ALLOCATIONGRANULARITY


@dataclass
class Segment:
    """What a segment says of itself.

    Attributes:
        file: its name.
        first: number of its first trajectory.
        lengths: T of each trajectory.
        checksums: CRC-32 of each trajectory.
        size: bytes of the file.
        compressed: field to dtype (safetensors name) and shape of one row, before compression.
    """

    file: str
    first: int
    lengths: list[int]
    checksums: list[int]
    size: int
    compressed: dict[str, list[Any]] = field(default_factory=dict)


def write_segment(
    path: Path, first: int, trajectories: Sequence[Trajectory], compressor: Compressor | None
) -> Segment:
    """Writes, syncs and renames into place; returns what was written.

    Raises:
        OSError: the disk is full, or not writable; nothing is left behind.
    """
    arrays: dict[str, Tensor] = {}
    compressed: dict[str, list[Any]] = {}
    for name in sorted(trajectories[0].fields):
        rows = torch.cat([t.fields[name] for t in trajectories]).cpu().contiguous()
        if compressor is not None and rows.dtype == torch.uint8 and rows.dim() > 2:
            arrays[name], arrays[name + BOUNDS] = compressor.pack(rows)
            compressed[name] = ["U8", list(rows.shape[1:])]
        else:
            arrays[name] = rows
    lengths = [t.length for t in trajectories]
    views = {name: value.numpy() for name, value in arrays.items()}
    starts = np.cumsum([0, *(length + 1 for length in lengths)])
    checksums = [
        _checksum(views, compressed, int(a), int(b))
        for a, b in zip(starts[:-1], starts[1:], strict=True)
    ]
    segment = Segment(path.name, first, lengths, checksums, 0, compressed)
    text = _describe(segment)
    table = {n: [_DTYPE_NAMES[v.dtype], list(v.shape)] for n, v in views.items()}
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            notes = {"segment": text, "check": str(_check(text, table))}
            segment.size = file.write(save(arrays, notes))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)
    return segment


class SegmentFile:
    """A segment opened for reading.

    Args:
        path: the file.

    Raises:
        DamagedError: the file is not a whole segment.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            except ValueError:
                raise DamagedError("it is empty") from None
        try:
            start = 8 + int.from_bytes(self._map[:8], "little")
            header = json.loads(self._map[8:start])
            notes = header.pop("__metadata__")
            table = {name: [v["dtype"], v["shape"]] for name, v in header.items()}
            sound = int(notes["check"]) == _check(notes["segment"], table)
            self.info = Segment(file=path.name, size=size, **json.loads(notes["segment"]))
            end = start + max(v["data_offsets"][1] for v in header.values())
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise DamagedError(f"its header is unreadable ({error})") from None
        if not sound:
            raise DamagedError("its header does not match its checksum")
        if size != end:
            raise DamagedError(f"it has {size} bytes, its header speaks of {end}")
        self._offsets = {name: start + v["data_offsets"][0] for name, v in header.items()}
        self._arrays = {}
        for name, v in header.items():
            dtype, count = DTYPES[v["dtype"]], math.prod(v["shape"])
            flat = np.frombuffer(self._map, dtype, count, self._offsets[name])
            self._arrays[name] = flat.reshape(v["shape"])
        self._starts = np.cumsum([0, *(length + 1 for length in self.info.lengths)])

    @property
    def names(self) -> list[str]:
        """The fields."""
        return [name for name in self._arrays if not name.endswith(BOUNDS)]

    def start(self, k: int) -> int:
        """First row of the segment's k-th trajectory."""
        return int(self._starts[k])

    def intact(self, k: int) -> bool:
        """Whether the k-th trajectory's bytes are the ones that were written."""
        rows = int(self._starts[k]), int(self._starts[k + 1])
        try:
            return _checksum(self._arrays, self.info.compressed, *rows) == self.info.checksums[k]
        except (IndexError, ValueError):  # damaged bounds of compressed rows
            return False

    def spec(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        """Dtype and shape of one row of a field."""
        packed = self.info.compressed.get(name)
        if packed is not None:
            return np.dtype(DTYPES[packed[0]]), tuple(packed[1])
        array = self._arrays[name]
        return array.dtype, array.shape[1:]

    def row_bytes(self, name: str) -> int:
        """Bytes of one row of a field, uncompressed."""
        dtype, shape = self.spec(name)
        return dtype.itemsize * math.prod(shape)

    def take(self, name: str, rows: np.ndarray, out: np.ndarray) -> None:
        """Copies the given rows of a field into `out` [len(rows), ...]."""
        if name not in self.info.compressed:
            np.take(self._arrays[name], rows, axis=0, out=out)
            return
        data, bounds = self._arrays[name], self._arrays[name + BOUNDS]
        for i, row in enumerate(rows):
            decompress(data[bounds[row] : bounds[row + 1]], out[i])

    def will_need(self, name: str, rows: np.ndarray, least: int) -> None:
        """Asks the kernel to read rows ahead, all at once instead of fault by fault.

        Rows of fewer than `least` bytes are left alone: the call would cost more than the fault.
        """
        if self.row_bytes(name) < least:
            return
        array = self._arrays[name]
        if name in self.info.compressed:
            bounds = self._arrays[name + BOUNDS]
            begin, end = bounds[rows], bounds[rows + 1]
        else:
            width = array[0].nbytes
            begin, end = rows * width, (rows + 1) * width
        for a, b in zip(begin + self._offsets[name], end + self._offsets[name], strict=True):
            page = int(a) // PAGE * PAGE
            self._map.madvise(mmap.MADV_WILLNEED, page, int(b) - page)


_DTYPE_NAMES = {np.dtype(v): k for k, v in DTYPES.items()}


def _describe(segment: Segment) -> str:
    fields = asdict(segment)
    del fields["file"], fields["size"]
    return json.dumps(fields)


def _check(text: str, table: dict[str, list[Any]]) -> int:
    return zlib.crc32((text + json.dumps(table, sort_keys=True)).encode())


def _checksum(
    arrays: dict[str, np.ndarray], compressed: dict[str, list[Any]], start: int, stop: int
) -> int:
    """CRC-32 over the stored bytes of rows [start, stop)."""
    crc = 0
    for name in sorted(arrays):
        if name in compressed:
            bounds = arrays[name + BOUNDS]
            part = arrays[name][int(bounds[start]) : int(bounds[stop])]
        else:
            part = arrays[name][start : stop + name.endswith(BOUNDS)]
        crc = zlib.crc32(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data, crc)
    return crc
