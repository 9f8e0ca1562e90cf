"""What a backbone records of weights that stay in the folder they came from, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from embodied_rl.backbones.lerobot_buffers import split_buffers
from embodied_rl.backbones.lerobot_folder import read_tensors
from embodied_rl.backbones.pi0_network import check_dtype

WEIGHTS = "model.safetensors"
Network = TypeVar("Network")
Settings = TypeVar("Settings")


def record(
    network: dict[str, Any], dtype: str, source: str | None, settings: Any
) -> dict[str, Any]:
    """A backbone's `config_dict`.

    Args:
        network: what it is built from.
        dtype: name of its precision.
        source: folder that the weights came from; None: they are in our own policy folder.
        settings: everything around it, a dataclass.
    """
    return {"network": network, "dtype": dtype, "source": source, **asdict(settings)}


def split_record(
    config: dict[str, Any],
) -> tuple[dict[str, Any], str, str | None, dict[str, Any]]:
    """Takes what `record` made apart again."""
    settings = dict(config)
    network, dtype, source = (settings.pop(key) for key in ("network", "dtype", "source"))
    return network, dtype, source, settings


def read_source(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and normalisation statistics of a LeRobot folder."""
    return split_buffers(read_tensors(folder / WEIGHTS))


def rebuild(
    config: dict[str, Any],
    sizes_of: Callable[..., Any],
    settings_of: Callable[..., Settings],
    build: Callable[[Any, torch.dtype], Network],
    load: Callable[[dict[str, torch.Tensor], Any, torch.dtype, str], Network],
) -> tuple[Network, Settings, str, str | None]:
    """Network, settings, precision and source out of a record; random weights without a source.

    Args:
        config: the record; weights come from a LeRobot folder.
        sizes_of: makes the network's sizes.
        settings_of: makes the settings.
        build: makes the network with random weights.
        load: makes the network of such weights; is told the folder's name for its errors.
    """
    network, dtype_name, source, settings = split_record(config)
    sizes, dtype = sizes_of(**network), check_dtype(dtype_name)
    if source is None:
        made = build(sizes, dtype)
    else:
        weights, _ = read_source(Path(source))
        made = load(weights, sizes, dtype, source)
    return made, settings_of(**settings), dtype_name, source
