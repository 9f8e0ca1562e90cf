"""Training a π0 by imitation: the flow-matching loss, and the times that it draws."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PI0Config, PI0ForConditionalGeneration

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
    """
    noise = torch.randn(actions.shape, generator=generator).to(actions)
    time = draw_times(network.config, len(actions), generator).to(actions.device)
    return network(**inputs, actions=actions, noise=noise, timestep=time).loss


def draw_times(config: PI0Config, count: int, generator: torch.Generator | None) -> Tensor:
    """Draws flow times [B] as π0's training does: Beta(a, 1), scaled into (0, 1).

    The distribution function of Beta(a, 1) is t^a, so t is a uniform number to the power 1 / a.

    Args:
        config: of the network.
        count: B.
        generator: draws, on the CPU; None: torch's default one.

    Raises:
        UserError: the second parameter is not 1.
    """
    if config.time_sampling_beta_beta != 1:
        raise UserError(
            f"time_sampling_beta_beta={config.time_sampling_beta_beta} in the policy's config. "
            "Allowed: 1."
        )
    uniform = torch.rand(count, generator=generator)
    times = uniform ** (1 / config.time_sampling_beta_alpha)
    return times * config.time_sampling_scale + config.time_sampling_offset
