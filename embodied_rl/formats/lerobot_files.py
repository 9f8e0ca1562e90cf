"""The files of a LeRobot dataset that grow to a size and then give way to the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from embodied_rl.formats import lerobot as layout
from embodied_rl.formats.video import VideoWriter

MB = 2**20


class ParquetFiles:
    """Parquet files of one kind.

    Args:
        folder: of the dataset.
        path: pattern of the files' paths below it.
        pq: the module `pyarrow.parquet`.
    """

    def __init__(self, folder: Path, path: str, pq: Any) -> None:
        self._folder, self._path, self._pq = folder, path, pq
        self._writer: Any = None
        self._bytes, self._number = 0, 0

    def place(self, nbytes: int) -> dict[str, int]:
        """Chunk and file index where the next row group of so many bytes goes."""
        if self._writer is not None and self._bytes + nbytes > layout.DATA_MB * MB:
            self.close()
            self._number, self._bytes = self._number + 1, 0
        return layout.slot(self._number)

    def append(self, table: Any) -> None:
        """Writes a row group where `place` said."""
        if self._writer is None:
            path = self._folder / self._path.format(**layout.slot(self._number))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = self._pq.ParquetWriter(path, table.schema)
        self._writer.write_table(table)
        self._bytes += table.nbytes

    def close(self) -> None:
        """Finishes the present file; harmless when called twice."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class VideoFiles:
    """The video files of one feature.

    Args:
        folder: of the dataset.
        feature: its name.
        size: height and width in pixels.
        fps: frames per second.
    """

    def __init__(self, folder: Path, feature: str, size: tuple[int, int], fps: int) -> None:
        self._folder, self._feature, self._size, self._fps = folder, feature, size, fps
        self._writer: VideoWriter | None = None
        self._number = -1

    def append(self, frames: np.ndarray) -> dict[str, float]:
        """Writes an episode, uint8 [T, height, width, 3]; returns where it lies.

        Raises:
            OSError: ffmpeg cannot write.
        """
        if self._writer is None or self._writer.nbytes > layout.VIDEO_MB * MB:
            self.close()
            self._number += 1
            where = layout.slot(self._number)
            path = self._folder / layout.VIDEO_PATH.format(video_key=self._feature, **where)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = VideoWriter(path, self._size, self._fps)
        start = self._writer.frames
        self._writer.append(frames)
        return {
            **layout.slot(self._number),
            "from_timestamp": start / self._fps,
            "to_timestamp": self._writer.frames / self._fps,
        }

    def close(self) -> None:
        """Finishes the present file; harmless when called twice.

        Raises:
            OSError: not every frame arrived in it.
        """
        if self._writer is not None:
            self._writer.close()
            self._writer = None
