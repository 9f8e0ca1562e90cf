"""Training a π0: what of it may change, with less memory, and the times of its loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PI0Config, PI0ForConditionalGeneration

from embodied_rl.errors import UserError


def prefix_blocks(network: PI0ForConditionalGeneration) -> list[nn.Module]:
    """The parts between observation and features, in that order."""
    vlm: Any = network.model.vlm
    vision, text = vlm.vision_tower, vlm.language_model
    layers = list(text.layers)
    return [
        vision.embeddings,
        *vision.encoder.layers,
        nn.ModuleList([vision.post_layernorm, vlm.multi_modal_projector]),
        text.embed_tokens,
        *layers[:-1],
        nn.ModuleList([layers[-1], text.norm]),
    ]


@contextmanager
def recomputed(network: PI0ForConditionalGeneration) -> Iterator[None]:
    """Lets the layers of the prefix keep only their inputs for the backward pass.

    transformers does so in training mode only. Just the layers themselves are put into it, not
    what is inside them, so nothing else behaves as in training.
    """
    vlm: Any = network.model.vlm
    layers = [*vlm.vision_tower.encoder.layers, *vlm.language_model.layers]
    before = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training


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
