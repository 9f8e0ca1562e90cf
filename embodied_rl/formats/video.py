"""Frames of many episodes in one MP4 file, written and read front to back.

H.264 is lossy: what comes back differs a little from what went in.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np

CODEC = "libx264"
# a key frame every other frame, for random access; no frames that refer to later ones
OPTIONS = ["-crf", "18", "-g", "2", "-bf", "0"]


def pixel_format(height: int, width: int) -> str:
    """What players expect, which halves the colour planes and so needs even sides."""
    return "yuv444p" if height % 2 or width % 2 else "yuv420p"


class VideoWriter:
    """An MP4 file that grows by frames.

    Args:
        path: of the file; its folder must exist.
        size: height and width in pixels.
        fps: frames per second.
    """

    def __init__(self, path: Path, size: tuple[int, int], fps: int) -> None:
        self.path, self.frames = path, 0
        self._pipe = imageio_ffmpeg.write_frames(
            path,
            (size[1], size[0]),
            pix_fmt_out=pixel_format(*size),
            fps=fps,
            quality=None,  # type: ignore[arg-type] - OPTIONS say it
            codec=CODEC,
            macro_block_size=1,
            ffmpeg_log_level="error",
            output_params=OPTIONS,
        )
        self._pipe.send(None)

    @property
    def nbytes(self) -> int:
        """Bytes that have reached the file by now."""
        return self.path.stat().st_size if self.path.exists() else 0

    def append(self, frames: np.ndarray) -> None:
        """Adds frames, uint8 [N, height, width, 3].

        Raises:
            OSError: ffmpeg cannot write.
        """
        for frame in frames:
            self._pipe.send(np.ascontiguousarray(frame))
        self.frames += len(frames)

    def close(self) -> None:
        """Finishes the file.

        Raises:
            OSError: not every frame arrived in it (the disk is full, say).
        """
        self._pipe.close()
        try:
            held = imageio_ffmpeg.count_frames_and_secs(self.path)[0]
        except RuntimeError:
            held = 0
        if held != self.frames:
            raise OSError(f"ffmpeg wrote {held} of {self.frames} frames to {self.path}")


class VideoReader:
    """Frames of MP4 files, cheap when asked for in the order in which they lie."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._frames: Iterator[Any] = iter(())
        self._size, self._next = (0, 0), 0

    def read(self, path: Path, start: int, count: int) -> np.ndarray:
        """Returns frames [start, start + count), uint8 [count, height, width, 3].

        Raises:
            ValueError: the file is no video, or ends before.
        """
        if path != self._path or start < self._next:
            self._open(path)
        frames = []
        while self._next < start + count:
            frame = next(self._frames, None)
            if frame is None:
                raise ValueError(f"{path} ends after {self._next} frames of {start + count}")
            if self._next >= start:
                frames.append(np.frombuffer(frame, np.uint8).reshape(*self._size, 3))
            self._next += 1
        return np.stack(frames)

    def close(self) -> None:
        """Ends the decoder; harmless when called twice."""
        self._path, self._frames = None, iter(())  # collecting the generator ends its process

    def _open(self, path: Path) -> None:
        self.close()
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        reader = imageio_ffmpeg.read_frames(path)
        try:
            width, height = next(reader)["size"]  # type: ignore[index]
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} is no video: {error}") from None
        self._path, self._frames, self._next = path, reader, 0
        self._size = (int(height), int(width))
