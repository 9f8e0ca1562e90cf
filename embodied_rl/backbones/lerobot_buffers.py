"""Statistics inside the weights of a LeRobot folder, as LeRobot wrote them before 0.4.

Read from the published source (`policies/normalize.py` of those versions; not run):

    normalize_inputs.buffer_observation_state.mean      of each input, dots as underscores
    normalize_targets.buffer_action.mean                for training
    unnormalize_outputs.buffer_action.mean              the same numbers
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from embodied_rl.backbones.lerobot_normalise import Normaliser
from embodied_rl.errors import UserError

INPUTS, TARGETS, OUTPUTS = "normalize_inputs.", "normalize_targets.", "unnormalize_outputs."
ACTION = "action"


def split_buffers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parts the tensors of a model.safetensors into weights and statistics, by name."""
    weights = {k: v for k, v in tensors.items() if not is_buffer(k)}
    return weights, {k: v for k, v in tensors.items() if is_buffer(k)}


def is_buffer(name: str) -> bool:
    """Whether a tensor of a model.safetensors is a statistic, not a weight."""
    return name.startswith((INPUTS, TARGETS, OUTPUTS))


def from_buffers(buffers: Mapping[str, Tensor], feature: str, mode: str, where: str) -> Normaliser:
    """Returns the normalisation of a feature.

    Args:
        buffers: what `split_buffers` found.
        feature: "observation.state", "action", ...
        mode: one of `lerobot_normalise.MODES`.
        where: the folder, for messages.

    Raises:
        UserError: the statistics are not there, or were never filled in (LeRobot starts them at
            infinity).
    """
    if mode == "IDENTITY":
        return Normaliser()
    start = OUTPUTS if feature == ACTION else INPUTS
    start += f"buffer_{feature.replace('.', '_')}."
    found = {k.removeprefix(start): v for k, v in buffers.items() if k.startswith(start)}
    if not all(torch.isfinite(value).all() for value in found.values()):
        raise UserError(
            f"{where}: the statistics {start}* in model.safetensors are infinite: the policy was "
            "saved without a dataset. Save it again after training."
        )
    return Normaliser.from_statistics(mode, found, 1e-8, f"{where}, {start}*")
