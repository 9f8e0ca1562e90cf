"""Sizes and checksums of a folder's files, so that damage is found before anything is loaded."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

MANIFEST = "manifest.json"
FORMAT = "embodied_rl.manifest"


class Damaged(ValueError):  # noqa: N818 - a finding about a folder, which the caller acts on
    """A folder is not what its manifest says; the message names the file and the difference."""


def sync(path: Path) -> None:
    """Puts a file, or the names in a folder (renames into it), on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe(path: Path) -> dict[str, int]:
    """Returns size in bytes and CRC-32 of one file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return {"bytes": path.stat().st_size, "crc32": crc}


def write_manifest(folder: Path) -> None:
    """Writes `manifest.json` over every file below the folder."""
    document = {
        "format": FORMAT,
        "files": {name: describe(folder / name) for name in _names(folder)},
    }
    text = json.dumps(document, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def verify_manifest(folder: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        Damaged: a file is missing, added or different, or the manifest cannot be read.
    """
    try:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        wanted = {str(name): dict(entry) for name, entry in document["files"].items()}
        known = document["format"] == FORMAT
    except OSError as error:
        hint = "checkpoints of before version 3 have none"
        raise Damaged(f"{MANIFEST}: {error.strerror} ({hint})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} is unreadable: {error}") from None
    if not known:
        raise Damaged(f"{MANIFEST} is of another format: {document['format']!r}")
    found = _names(folder)
    different = sorted(set(found) ^ set(wanted))
    if different:
        name = different[0]
        raise Damaged(f"{name} is {'missing' if name in wanted else 'not in the manifest'}")
    for name, entry in wanted.items():
        check_file(folder / name, entry, name)


def check_file(path: Path, wanted: dict[str, int], name: str) -> None:
    """Compares one file with what `describe` said of it.

    Raises:
        Damaged: size or checksum differ.
    """
    found = describe(path)
    if found["bytes"] != wanted.get("bytes"):
        raise Damaged(f"{name} has {found['bytes']} bytes, written were {wanted.get('bytes')}")
    if found["crc32"] != wanted.get("crc32"):
        raise Damaged(f"{name} has another checksum than when it was written")


def _names(folder: Path) -> list[str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return [n for n in (p.relative_to(folder).as_posix() for p in files) if n != MANIFEST]
