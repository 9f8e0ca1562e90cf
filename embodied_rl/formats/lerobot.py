"""The layout of a LeRobot dataset, version 3.0, and what we add to it.

    meta/info.json                              features, counts, paths, frames per second
    meta/stats.json, meta/tasks.parquet         statistics per feature; the tasks' texts
    meta/episodes/chunk-000/file-000.parquet    a row per episode: where it lies, its statistics
    data/chunk-000/file-000.parquet             a row per frame, a row group per episode
    videos/<feature>/chunk-000/file-000.mp4     the frames of many episodes, end to end
    embodied_rl/fields.json, rest-000.safetensors   ours, for an exact return; LeRobot ignores it

A LeRobot episode has T frames; a trajectory has T decisions and T + 1 observations. The T frames
are the decisions; the final observation, and fields that LeRobot has no place for, are in the last
folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from embodied_rl.errors import UserError

VERSION = "v3.0"
FILES_PER_CHUNK = 1000
DATA_MB, VIDEO_MB = 100, 200
SLOT = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA_PATH = f"data/{SLOT}.parquet"
EPISODES_PATH = f"meta/episodes/{SLOT}.parquet"
VIDEO_PATH = f"videos/{{video_key}}/{SLOT}.mp4"
INFO, STATS, TASKS = "meta/info.json", "meta/stats.json", "meta/tasks.parquet"
INDEX_FEATURES = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
ACTION, REWARD, DONE = "action", "next.reward", "next.done"
TRUNCATED, SUCCESS = "next.truncated", "next.success"
OBS, IMAGES = "observation.", "observation.images."

OWN_FIELDS, OWN_REST = "embodied_rl/fields.json", "embodied_rl/rest-{:03d}.safetensors"
OWN_FORMAT, OWN_VERSION = "embodied_rl.lerobot", 1


def slot(number: int) -> dict[str, int]:
    """Chunk and file index of the `number`-th file of a kind."""
    return {"chunk_index": number // FILES_PER_CHUNK, "file_index": number % FILES_PER_CHUNK}


def is_image(value: Tensor) -> bool:
    """Whether observations [T + 1, ...] are what a video can hold: uint8 [height, width, 3]."""
    return str(value.dtype) == "torch.uint8" and value.dim() == 4 and value.shape[-1] == 3


def is_dataset(path: Path) -> bool:
    """Whether a folder is a LeRobot dataset of some version."""
    return (path / INFO).is_file()


def arrow() -> tuple[Any, Any]:
    """Returns `pyarrow` and `pyarrow.parquet`.

    Raises:
        UserError: the package is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "LeRobot datasets need the package pyarrow, which is not installed. Run: "
            "pip install -e '.[lerobot]'"
        ) from None
    return pyarrow, pyarrow.parquet
