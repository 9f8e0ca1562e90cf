"""Camera images to the pixels that a vision tower reads, as tensor code without torchvision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from embodied_rl.errors import UserError

RESIZES = ("openpi", "transformers", "smolvla")


def check_resize(style: str) -> str:
    """Returns a resize style's name.

    Raises:
        UserError: there is none of that name.
    """
    if style not in RESIZES:
        raise UserError(f"resize={style!r} is unknown. Allowed: {', '.join(RESIZES)}.")
    return style


def to_pixels(images: Tensor, size: int, style: str) -> Tensor:
    """Resizes images, pads them to squares and scales them to [-1, 1].

    Each style repeats what a published preprocessing does, for a policy is used as it was trained:

    - `openpi` (openpi and LeRobot): bilinear without antialiasing, centred on black.
    - `smolvla` (LeRobot's SmolVLA): the same, at the bottom right of black.
    - `transformers` (PI0ImageProcessor): bicubic with antialiasing, rounded to grey levels, at the
      top left of mid-grey (it pads after it has normalised).

    Args:
        images: [B, h, w, 3] uint8.
        size: side S of the result.
        style: one of `RESIZES`.

    Returns:
        [B, 3, S, S] float32.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"images must be uint8 [B, h, w, 3], got {images.dtype} {tuple(images.shape)}"
        )
    check_resize(style)
    pixels = images.permute(0, 3, 1, 2).float()
    height, width = images.shape[1:3]
    if style == "transformers":
        scale = min(size / height, size / width)
        inner = (max(1, int(height * scale)), max(1, int(width * scale)))
        if inner != (height, width):
            pixels = F.interpolate(pixels, inner, mode="bicubic", antialias=True)
            pixels = pixels.round().clamp(0, 255)
        pixels = pixels / 127.5 - 1
        return F.pad(pixels, (0, size - inner[1], 0, size - inner[0]))
    ratio = max(height / size, width / size)
    inner = (max(1, int(height / ratio)), max(1, int(width / ratio)))
    if inner != (height, width):
        pixels = F.interpolate(pixels, inner, mode="bilinear", align_corners=False)
    top, left = size - inner[0], size - inner[1]
    if style == "openpi":
        top, left = top // 2, left // 2
    bottom, right = size - inner[0] - top, size - inner[1] - left
    return F.pad(pixels, (left, right, top, bottom)) / 127.5 - 1
