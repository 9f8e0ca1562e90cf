"""Policy folders: where they are, and what is in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from embodied_rl.backbones.lerobot_hub import download, is_hub_id
from embodied_rl.errors import UserError
from embodied_rl.manifest import Damaged, check_file
from embodied_rl.registry import LAYOUTS

FORMAT, VERSION = "embodied_rl.policy", 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
SHIPPED = Path(__file__).parent / "pretrained"


def find_policy(path: str | Path) -> Path:
    """Resolves a policy, checkpoint or run folder, or a shipped policy's name, to its folder.

    Raises:
        UserError: nothing there; lists the shipped policies.
    """
    if is_hub_id(str(path)) and not (SHIPPED / path).exists():
        path = download(str(path))
    path = Path(path)
    places = [path, path / "policy", path / "checkpoints" / "best" / "policy"]
    for place in [*places, path / "checkpoints" / "last" / "policy", SHIPPED / path]:
        if (place / CONFIG).is_file():
            return place
    shipped = sorted(p.name for p in SHIPPED.glob("*") if p.is_dir())
    what = f"{path} holds no {CONFIG}" if path.is_dir() else f"no folder {path}"
    raise UserError(
        f"cannot load the policy: {what}. Give a policy folder ({CONFIG} + {WEIGHTS}), a run or "
        f"checkpoint folder, a Hub repository (owner/name), or a shipped policy: "
        f"{', '.join(shipped)}."
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Returns a policy folder's config.json, of our layout or another project's.

    Raises:
        UserError: it cannot be read, or a later version wrote it.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / CONFIG}: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG} is not an {FORMAT} config: it is no object.")
    if config.get("format") == FORMAT and config.get("version") != VERSION:
        raise UserError(
            f"{folder / CONFIG} has version {config.get('version')!r}, this embodied_rl reads "
            f"{VERSION}. Upgrade embodied_rl."
        )
    return config


def read_weights(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the weights beside a config of our layout.

    Raises:
        UserError: they are missing, damaged or truncated.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(
            f"the policy folder {folder} has no {WEIGHTS}. Copy it there and try again."
        )
    try:
        if "weights" in config:  # policies saved by earlier versions have no checksum
            check_file(path, config["weights"], WEIGHTS)
        return load_file(path)
    except (SafetensorError, OSError, Damaged) as error:
        raise UserError(
            f"{path} is damaged or truncated ({error}). Copy the file again from its source (if "
            f"you changed it yourself: delete its checksum, 'weights', from {CONFIG})."
        ) from None


def layout(folder: Path, config: dict[str, Any]) -> str:
    """Name of the backbone that reads another project's folder.

    Raises:
        UserError: none does.
    """
    found = config.get("type", config.get("model_type"))  # LeRobot's, transformers'
    if found in LAYOUTS:
        return LAYOUTS[found]
    raise UserError(
        f"{folder / CONFIG} is not an {FORMAT} config, and its type {found!r} is of no known "
        f"layout. Known: {', '.join(sorted(LAYOUTS))}."
    )
