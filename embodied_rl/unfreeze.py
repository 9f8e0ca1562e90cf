"""Which weights of a pretrained policy training may change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from embodied_rl.config import PolicyConfig
from embodied_rl.errors import UserError
from embodied_rl.interfaces import Backbone


def unfreeze(backbone: Backbone, config: PolicyConfig) -> list[nn.Parameter]:
    """Freezes a backbone but for what `policy.trainable` names, and returns that.

    `lora` puts low-rank adapters (Hu et al. 2021, through peft) beside every linear layer of the
    backbone's blocks; they start at zero change, in float32.

    Raises:
        UserError: peft is not installed, there is nothing to train, or 16-bit weights would be
            trained in place.
    """
    backbone.requires_grad_(False)
    if config.trainable == "none":
        return []
    if config.trainable == "lora":
        add_lora(backbone, backbone.blocks(), config.lora_rank)
    else:
        blocks = backbone.blocks()
        for block in blocks[-config.last_blocks :] if config.trainable == "last" else blocks:
            block.requires_grad_(True)
    trained = [p for p in backbone.parameters() if p.requires_grad]
    if not trained:
        raise UserError(
            f"policy.trainable={config.trainable}: {type(backbone).__name__} has no such weights "
            "between observation and features. Set policy.trainable=none."
        )
    small = {str(p.dtype) for p in trained if torch.finfo(p.dtype).bits < 32}
    if small:
        raise UserError(
            f"policy.trainable={config.trainable} would train {', '.join(sorted(small))} weights "
            "in place, where most updates round to nothing. Set policy.dtype=float32, or "
            "policy.trainable=lora, whose own weights are float32."
        )
    if config.gradient_checkpointing:
        backbone.enable_checkpointing()
    backbone.frozen = False
    return trained


def describe(config: PolicyConfig) -> dict[str, Any] | None:
    """What a policy folder says of its backbone's training; None where there was none."""
    if config.trainable == "none":
        return None
    keys = ("trainable", "lora_rank", "last_blocks")
    return {key: getattr(config, key) for key in keys}


def add_lora(backbone: Backbone, parts: Iterable[nn.Module], rank: int) -> None:
    """Puts low-rank adapters, in float32, beside every linear layer of the parts.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError(
            "trainable=lora needs the package peft. Install it: pip install peft"
        ) from None
    inside = {module for part in parts for module in part.modules()}
    names = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and module in inside
    ]
    if not names:
        return
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
    inject_adapter_in_model(settings, backbone)
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def merge_lora(backbone: Backbone) -> None:
    """Adds low-rank adapters to the weights that they stand beside, and takes them away."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(backbone.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            owner, _, attribute = name.rpartition(".")
            setattr(backbone.get_submodule(owner), attribute, module.get_base_layer())
