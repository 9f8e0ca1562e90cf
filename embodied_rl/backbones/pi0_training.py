"""Training a π0 by imitation: the flow-matching loss."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PI0ForConditionalGeneration

from embodied_rl.backbones.flow_times import draw_times
from embodied_rl.errors import UserError


def flow_loss(
    network: PI0ForConditionalGeneration,
    inputs: dict[str, Tensor],
    actions: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """Flow-matching loss of normalised and padded chunks [B, H, W].

    Args:
        network: the model.
        inputs: of the observations, preprocessed.
        actions: the chunks, in the network's precision.
        generator: draws noise and times, on the CPU; None: torch's default one.

    Raises:
        UserError: the second parameter of the times' distribution is not 1.
    """
    config = network.config
    if config.time_sampling_beta_beta != 1:
        raise UserError(
            f"time_sampling_beta_beta={config.time_sampling_beta_beta} in the policy's config. "
            "Allowed: 1."
        )
    noise = torch.randn(actions.shape, generator=generator).to(actions)
    time = draw_times(
        len(actions),
        generator,
        config.time_sampling_beta_alpha,
        config.time_sampling_scale,
        config.time_sampling_offset,
    ).to(actions.device)
    return network(**inputs, actions=actions, noise=noise, timestep=time).loss
