"""The image network of ACT: transformers' ResNet under torchvision's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

# torchvision's name -> (layers in each of the four stages, kind of layer)
RESNETS = {
    "resnet18": ([2, 2, 2, 2], "basic"),
    "resnet34": ([3, 4, 6, 3], "basic"),
    "resnet50": ([3, 4, 6, 3], "bottleneck"),
    "resnet101": ([3, 4, 23, 3], "bottleneck"),
    "resnet152": ([3, 8, 36, 3], "bottleneck"),
}
WIDTHS = {"basic": [64, 128, 256, 512], "bottleneck": [256, 512, 1024, 2048]}


class FrozenBatchNorm(nn.Module):
    """Batch normalisation with fixed statistics and fixed scale, as torchvision's frozen one.

    All four are buffers: nothing trains them and no forward pass moves them.

    Args:
        size: channels.
        eps: added to the variance.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((size,), float(value)))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises [B, C, h, w]; the folded scale and shift are computed in float32."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]


def resnet_config(name: str) -> dict[str, Any]:
    """What distinguishes the ResNet of that name, as arguments of `ResNetConfig`."""
    depths, kind = RESNETS[name]
    return {
        "embedding_size": 64,
        "hidden_sizes": WIDTHS[kind],
        "depths": depths,
        "layer_type": kind,
    }


def build_resnet(config: dict[str, Any]) -> ResNetModel:
    """Builds the network with random weights and frozen normalisation.

    Args:
        config: arguments of `ResNetConfig`.
    """
    network = ResNetModel(ResNetConfig(**config))
    convolutions = [m for m in network.modules() if hasattr(m, "normalization")]
    for module in convolutions:
        module.normalization = FrozenBatchNorm(module.normalization.num_features)  # type: ignore[union-attr,arg-type]
    return network


def torchvision_names(network: ResNetModel) -> dict[str, str]:
    """Published name of every tensor, by its name in transformers' network.

    torchvision calls the first convolution conv1 and its normalisation bn1; stage s is layer{s}
    from 1, with conv1, bn1, conv2, ... in each of its layers and downsample.0, .1 beside them.
    """
    pairs = dict(_modules(network))
    names = {}
    for ours, theirs in pairs.items():
        module: Any = network.get_submodule(ours)
        names |= {f"{ours}.{k}": f"{theirs}.{k}" for k in module.state_dict()}
    return names


def _modules(network: ResNetModel) -> Iterator[tuple[str, str]]:
    """Pairs of names, ours and published, of the convolutions and normalisations."""
    yield "embedder.embedder.convolution", "conv1"
    yield "embedder.embedder.normalization", "bn1"
    stages: Any = network.encoder.stages
    for s, stage in enumerate(stages):
        for i, layer in enumerate(stage.layers):
            ours, theirs = f"encoder.stages.{s}.layers.{i}", f"layer{s + 1}.{i}"
            for j in range(len(layer.layer)):
                yield f"{ours}.layer.{j}.convolution", f"{theirs}.conv{j + 1}"
                yield f"{ours}.layer.{j}.normalization", f"{theirs}.bn{j + 1}"
            if not isinstance(layer.shortcut, nn.Identity):
                yield f"{ours}.shortcut.convolution", f"{theirs}.downsample.0"
                yield f"{ours}.shortcut.normalization", f"{theirs}.downsample.1"
