"""The append-only index of a store: one JSON line per event, each with its own checksum.

    {"segment": {"file": ..., "first": ..., "lengths": [...], "size": ...}, "crc32": ...}
    {"evicted": 1234, "crc32": ...}               trajectories below this number were evicted
    {"lost": [17, "reason"], "crc32": ...}        a damaged trajectory is left out

A torn or damaged line costs nothing: segments describe themselves, so their lines can be rebuilt.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embodied_rl.manifest import sync

INDEX = "index.jsonl"


@dataclass
class Listed:
    """What the index says of one segment."""

    file: str
    first: int
    lengths: list[int]
    size: int


@dataclass
class Index:
    """The events of an index, read.

    Attributes:
        segments: by file name, in the order of writing.
        evicted: trajectories below this number are gone on purpose.
        lost: number to reason, for trajectories found damaged.
        damaged_lines: how many could not be read.
    """

    segments: dict[str, Listed] = field(default_factory=dict)
    evicted: int = 0
    lost: dict[int, str] = field(default_factory=dict)
    damaged_lines: int = 0


def read_index(folder: Path) -> Index:
    """Reads the index; an absent one is empty.

    Raises:
        OSError: it is there and cannot be read.
    """
    index = Index()
    path = folder / INDEX
    if not path.exists():
        return index
    content = path.read_bytes()
    lines = content.split(b"\n")
    if lines.pop():  # no newline at the end: the line being written when a run died
        index.damaged_lines += 1
    for line in lines:
        try:
            event = json.loads(line)
            check = event.pop("crc32")
            if check != _crc(event):
                raise ValueError("checksum")
        except (ValueError, KeyError, TypeError, AttributeError):
            index.damaged_lines += 1
            continue
        _book(index, event)
    return index


def append_event(folder: Path, event: dict[str, Any]) -> None:
    """Adds one line and syncs it.

    Raises:
        OSError: the disk is full, or not writable; the line may then be torn.
    """
    with (folder / INDEX).open("a+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        torn = file.read(1) not in (b"\n", b"")  # an earlier append that a full disk cut short
        file.write(b"\n" * torn + _line(event))
        file.flush()
        os.fsync(file.fileno())


def write_index(folder: Path, index: Index) -> None:
    """Replaces the whole index at once."""
    events: list[dict[str, Any]] = [segment_event(s) for s in index.segments.values()]
    if index.evicted:
        events.append({"evicted": index.evicted})
    events += [{"lost": [number, reason]} for number, reason in index.lost.items()]
    temporary = folder / f"{INDEX}.tmp"
    with temporary.open("wb") as file:
        file.write(b"".join(map(_line, events)))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / INDEX)
    sync(folder)


def segment_event(listed: Listed) -> dict[str, Any]:
    """The event of a new segment."""
    return {"segment": dict(vars(listed))}


def _book(index: Index, event: dict[str, Any]) -> None:
    if "segment" in event:
        listed = Listed(**event["segment"])
        index.segments[listed.file] = listed
    elif "evicted" in event:
        index.evicted = max(index.evicted, int(event["evicted"]))
    elif "lost" in event:
        number, reason = event["lost"]
        index.lost[int(number)] = str(reason)


def _line(event: dict[str, Any]) -> bytes:
    return (json.dumps({**event, "crc32": _crc(event)}) + "\n").encode()


def _crc(event: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(event, sort_keys=True).encode())
