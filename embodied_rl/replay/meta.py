"""`meta.json` of a trajectory store: its format, and what its trajectories share."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from embodied_rl.errors import UserError

FORMAT, VERSION = "embodied_rl.replay", 2
META = "meta.json"


def read_meta(folder: Path) -> dict[str, Any]:
    """Reads what a store says of itself.

    Raises:
        UserError: the folder is no store, or one of another version.
    """
    path = folder / META
    if not path.is_file():
        raise UserError(f"{folder} holds no {META}, so it is not a trajectory folder.")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        found = meta["format"], meta["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}). Copy the folder again.") from None
    if found != (FORMAT, VERSION):
        raise UserError(
            f"{path} says format {found[0]!r} version {found[1]!r}; this version of "
            f"embodied_rl reads {FORMAT!r} version {VERSION}. Use the version that wrote it."
        )
    return meta


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Writes it at once, unless it is there.

    Raises:
        OSError: the disk is full, or not writable.
    """
    path = folder / META
    if path.exists():
        return
    temporary = folder / f"{META}.tmp"
    document = {"format": FORMAT, "version": VERSION, **meta}
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
