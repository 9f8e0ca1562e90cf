"""Weights of a SmolVLA: the names in LeRobot's model.safetensors, and loading them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from embodied_rl.backbones.smolvla_network import SmolVLANetwork
from embodied_rl.backbones.smolvla_sizes import SmolVLASizes
from embodied_rl.errors import UserError

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
    weights = {
        MODEL + k.removeprefix(COMPILED) if k.startswith(COMPILED) else k: v
        for k, v in weights.items()
    }
    with torch.device("meta"):
        network = SmolVLANetwork(sizes)
    names, own = published_names(network), network.state_dict()
    shapes = {theirs: tuple(own[ours].shape) for ours, theirs in names.items()}
    known = {**shapes, **unread_shapes(sizes)}
    told = {
        "missing": sorted(set(shapes) - set(weights)),
        "unexpected": sorted(set(weights) - set(known)),
        "of another shape": sorted(
            k for k, v in weights.items() if k in known and tuple(v.shape) != known[k]
        ),
    }
    parts = [f"{len(k)} {what} ({', '.join(k[:3])})" for what, k in told.items() if k]
    if parts:
        raise UserError(
            f"{where}: these weights are not those of the SmolVLA in its config.json: "
            f"{'; '.join(parts)}. Copy config.json and model.safetensors from the same source; "
            "vlm_model_name must be the model that it was trained over."
        )
    state = {ours: weights[theirs].to(dtype) for ours, theirs in names.items()}
    network.load_state_dict(state, assign=True)
    return network.eval()
