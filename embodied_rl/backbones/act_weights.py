"""Weights of an ACT: the names in LeRobot's model.safetensors, loading and writing them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embodied_rl.backbones.act_network import ActNetwork, ActSizes, Encoder
from embodied_rl.backbones.act_resnet import torchvision_names
from embodied_rl.backbones.lerobot_weights import check_weights, write_weights

MODEL = "model."  # what the names of all weights start with
VISION = "backbone."


def published_names(network: ActNetwork) -> dict[str, str]:
    """Name in model.safetensors of every tensor, by its name in the network.

    All modules have the published names already, but for those of the image network.
    """
    names = {name: MODEL + name for name in network.state_dict()}
    if network.sizes.resnet is not None:
        vision = torchvision_names(network.backbone)
        names |= {VISION + ours: MODEL + VISION + theirs for ours, theirs in vision.items()}
    return names


def unread_shapes(sizes: ActSizes) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of what only training reads: the variational encoder."""
    if not sizes.use_vae:
        return {}
    width, latent = sizes.dim_model, sizes.latent_dim
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {
            "vae_encoder": Encoder(sizes, sizes.n_vae_encoder_layers),
            "vae_encoder_cls_embed": nn.Embedding(1, width),
            "vae_encoder_action_input_proj": nn.Linear(sizes.action_dim, width),
            "vae_encoder_latent_output_proj": nn.Linear(width, 2 * latent),
        }
        if sizes.state_dim:
            state = nn.Linear(sizes.state_dim, width)
            parts["vae_encoder_robot_state_input_proj"] = state
    shapes = {
        f"{MODEL}{part}.{name}": tuple(tensor.shape)
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    length = sizes.chunk_size + 1 + bool(sizes.state_dim)
    return {**shapes, f"{MODEL}vae_encoder_pos_enc": (1, length, width)}


def build_network(sizes: ActSizes, dtype: torch.dtype) -> ActNetwork:
    """Builds the network with random weights; buffers of its normalisation stay float32."""
    network = ActNetwork(sizes)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    return network.eval()


def load_network(
    weights: Mapping[str, Tensor], sizes: ActSizes, dtype: torch.dtype, where: str
) -> ActNetwork:
    """Builds the network with published weights.

    Args:
        weights: by published name, without statistics.
        sizes: of the network.
        dtype: its precision.
        where: the folder, for messages.

    Raises:
        UserError: tensors are missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        network = ActNetwork(sizes)
    names = published_names(network)
    own: dict[str, Any] = network.state_dict()
    shapes = {theirs: tuple(own[ours].shape) for ours, theirs in names.items()}
    check_weights(weights, shapes, unread_shapes(sizes), where, "ACT")
    buffers = {name for name, _ in network.named_buffers()}
    state = {
        ours: weights[theirs].to(torch.float32 if ours in buffers else dtype)
        for ours, theirs in names.items()
    }
    network.load_state_dict(state, assign=True)
    return network.eval()


def write_network(network: ActNetwork, source: Path, folder: Path) -> None:
    """Writes a folder like `source`, with the network's weights; its variational encoder stays."""
    unread = unread_shapes(network.sizes)
    write_weights(source, folder, network.state_dict(), published_names(network), unread)
