"""The prefix of a π0: images and instruction through the vision-language model, to features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PI0ForConditionalGeneration


def encode(
    network: PI0ForConditionalGeneration, inputs: dict[str, Tensor], *, recompute: bool
) -> Any:
    """Runs the vision-language model: last hidden state [B, P, hidden], keys and values.

    With `recompute` there are no keys and values.
    """
    model, mask = network.model, inputs["attention_mask"]
    with recomputed(network) if recompute else nullcontext():
        embeds = model.embed_prefix(
            inputs["input_ids"], inputs["pixel_values"], inputs["pixel_attention_mask"]
        )
        return model.vlm(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=mask.cumsum(-1) - 1,
            token_type_ids=torch.zeros_like(embeds)[:, :, 0],
            use_cache=not recompute,
        )


def average(hidden: Tensor, mask: Tensor, cameras: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Averages the last hidden state over each camera and over the text.

    Args:
        hidden: [B, P, hidden], images first.
        mask: [B, P], zero for padding.
        cameras: C.
        tokens: of each image.

    Returns:
        [B, C, hidden] and [B, hidden].
    """
    split = cameras * tokens
    seen = hidden[:, :split].unflatten(1, (cameras, tokens)).mean(2)
    weight = mask[:, split:, None].to(hidden.dtype)
    text = (hidden[:, split:] * weight).sum(1) / weight.sum(1)
    return seen, text


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
