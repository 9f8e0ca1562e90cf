"""The features of a LeRobot dataset: what our fields are called there, and their descriptions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from embodied_rl.formats import lerobot as layout
from embodied_rl.formats.video import CODEC, pixel_format

NEXT = {  # what a step leads to: our field, LeRobot's feature
    "reward": layout.REWARD,
    "truncated": layout.TRUNCATED,
    "success": layout.SUCCESS,
}


def feature_name(name: str, value: Tensor) -> str | None:
    """LeRobot's name for a field; None where it has none."""
    if name.startswith("obs."):
        prefix = layout.IMAGES if layout.is_image(value) else layout.OBS
        return prefix + name.removeprefix("obs.").replace("/", ".")
    return layout.ACTION if name == "action" else NEXT.get(name)


def dtype_name(value: Tensor) -> str:
    """Name of a type, as LeRobot and numpy spell it."""
    return str(value.dtype).removeprefix("torch.")


def row_spec(value: Tensor) -> dict[str, Any]:
    """Type and shape of one row of a field."""
    return {"dtype": dtype_name(value), "shape": list(value.shape[1:])}


def number_feature(dtype: str, shape: list[int]) -> dict[str, Any]:
    """What `info.json` says of numbers."""
    return {"dtype": dtype, "shape": shape or [1], "names": None}


def video_feature(height: int, width: int, fps: int) -> dict[str, Any]:
    """What `info.json` says of a camera."""
    return {
        "dtype": "video",
        "shape": [height, width, 3],
        "names": ["height", "width", "channels"],
        "info": {
            "video.height": height,
            "video.width": width,
            "video.codec": "h264" if CODEC == "libx264" else CODEC,
            "video.pix_fmt": pixel_format(height, width),
            "video.fps": fps,
            "video.channels": 3,
            "has_audio": False,
            "is_depth_map": False,
        },
    }
