"""π0 in folders: the published layouts, read and written, and the config in our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PI0Config, PI0ForConditionalGeneration

from embodied_rl.backbones.lerobot_folder import read_json
from embodied_rl.backbones.pi0_inputs import check_cameras
from embodied_rl.backbones.pi0_network import (
    CONFIG,
    UNREAD,
    build_network,
    check_dtype,
    from_lerobot,
    from_transformers,
    load_network,
    published_names,
)
from embodied_rl.backbones.pi0_settings import (
    PALIGEMMA,
    Pi0Settings,
    lerobot_settings,
    transformers_settings,
)
from embodied_rl.backbones.prompts import find_tokenizer, load_tokenizer
from embodied_rl.backbones.published_folder import write_folder
from embodied_rl.backbones.source import split_record
from embodied_rl.config import PolicyConfig


def read_folder(folder: Path) -> tuple[PI0Config, Pi0Settings, str]:
    """What a published folder says but for its weights.

    Returns:
        Network, settings, and the Hub repository of the tokenizer.

    Raises:
        UserError: something in the folder does not fit; says what.
    """
    given = read_json(folder / CONFIG)
    where = str(folder / CONFIG)
    if given.get("type") == "pi0":
        network_config = from_lerobot(given, where)
        settings, tokenizer = lerobot_settings(folder)
    else:
        network_config = from_transformers(given, where)
        settings, tokenizer = transformers_settings(folder), PALIGEMMA
    return network_config, settings, tokenizer


def load_folder(
    folder: Path, config: PolicyConfig
) -> tuple[PI0ForConditionalGeneration, Pi0Settings]:
    """Loads a transformers or LeRobot folder.

    Raises:
        UserError: something in the folder or in `config` does not fit; says what.
    """
    dtype = check_dtype(config.dtype)
    network_config, settings, tokenizer = read_folder(folder)
    cameras = check_cameras(config.cameras, settings.camera_names)
    settings.cameras = [list(pair) for pair in cameras.items()]
    settings.state_keys = list(config.state)
    settings.tokenizer = str(find_tokenizer(folder, config.tokenizer, tokenizer).resolve())
    load_tokenizer(Path(settings.tokenizer))
    return load_network(folder, network_config, dtype), settings


def write_trained(network: PI0ForConditionalGeneration, source: Path, folder: Path) -> None:
    """Writes the layout of `source`, with the network's weights."""
    names = published_names(network)
    weights = network.state_dict()
    write_folder(source, folder, names, weights, UNREAD)


def rebuild(
    config: dict[str, Any],
) -> tuple[PI0ForConditionalGeneration, Pi0Settings, str, str | None]:
    """What `Pi0Backbone` is made of, out of its `config_dict`."""
    network_args, dtype_name, source, settings = split_record(config)
    network_config = from_transformers(network_args, "the policy's config")
    dtype = check_dtype(dtype_name)
    if source is None:
        network = build_network(network_config, dtype)
    else:
        network = load_network(Path(source), network_config, dtype)
    return network, Pi0Settings(**settings), dtype_name, source
