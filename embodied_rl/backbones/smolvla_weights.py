"""Weights of a SmolVLA: the names in LeRobot's model.safetensors, loading and writing them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from embodied_rl.backbones.lerobot_weights import check_weights, write_weights
from embodied_rl.backbones.smolvla_network import SmolVLANetwork
from embodied_rl.backbones.smolvla_sizes import SmolVLASizes

# where the network's parts are in LeRobot's policy
PARTS = {"vlm.": "model.vlm_with_expert.vlm.model.", "expert.": "model.vlm_with_expert.lm_expert."}
MODEL = "model."
COMPILED = "model._orig_mod."  # what torch.compile made of it, where LeRobot saved it compiled
LANGUAGE_HEAD = "model.vlm_with_expert.vlm.lm_head.weight"  # never read: no words are generated


def published_names(network: SmolVLANetwork) -> dict[str, str]:
    """Name in model.safetensors of every tensor, by its name in the network."""
    names = {}
    for ours in network.state_dict():
        part = next((p for p in PARTS if ours.startswith(p)), "")
        names[ours] = PARTS.get(part, MODEL) + ours.removeprefix(part)
    return names


def plain_name(name: str) -> str:
    """The published name of a tensor that was perhaps saved compiled."""
    return MODEL + name.removeprefix(COMPILED) if name.startswith(COMPILED) else name


def unread_shapes(sizes: SmolVLASizes) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of what nothing reads: the language model's head."""
    return {LANGUAGE_HEAD: (sizes.vlm["text_config"]["vocab_size"], sizes.hidden)}


def build_network(sizes: SmolVLASizes, dtype: torch.dtype) -> SmolVLANetwork:
    """Builds the network with random weights."""
    return SmolVLANetwork(sizes).to(dtype).eval()


def load_network(
    weights: Mapping[str, Tensor], sizes: SmolVLASizes, dtype: torch.dtype, where: str
) -> SmolVLANetwork:
    """Builds the network with published weights.

    Args:
        weights: by published name, without statistics.
        sizes: of the network.
        dtype: its precision; published weights mix two.
        where: the folder, for messages.

    Raises:
        UserError: tensors are missing, unexpected or of another shape.
    """
    weights = {plain_name(k): v for k, v in weights.items()}
    with torch.device("meta"):
        network = SmolVLANetwork(sizes)
    names, own = published_names(network), network.state_dict()
    shapes = {theirs: tuple(own[ours].shape) for ours, theirs in names.items()}
    check_weights(weights, shapes, unread_shapes(sizes), where, "SmolVLA")
    state = {ours: weights[theirs].to(dtype) for ours, theirs in names.items()}
    network.load_state_dict(state, assign=True)
    return network.eval()


def write_network(network: SmolVLANetwork, source: Path, folder: Path) -> None:
    """Writes a folder like `source`, with the network's weights; the language head stays."""
    names, unread = published_names(network), unread_shapes(network.sizes)
    write_weights(source, folder, network.state_dict(), names, unread, plain_name)
