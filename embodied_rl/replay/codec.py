"""Optional lossless compression of image rows, a zstd frame a row: any row is reachable."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied_rl.errors import UserError

LEVEL = 1  # simulated images: higher levels cost several times the time for a tenth of the size


class Compressor:
    """Packs uint8 rows with zstd.

    Raises:
        UserError: the `zstandard` package is missing.
    """

    def __init__(self) -> None:
        self._zstd = _library().ZstdCompressor(level=LEVEL)

    def pack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the frames of rows [N, ...] end to end, and their bounds, int64 [N + 1]."""
        frames = [self._zstd.compress(row.numpy().tobytes()) for row in rows]
        bounds = np.cumsum([0, *(len(frame) for frame in frames)])
        data = np.frombuffer(b"".join(frames), np.uint8).copy()
        return torch.from_numpy(data), torch.from_numpy(bounds.astype(np.int64))


def decompress(frame: np.ndarray, out: np.ndarray) -> None:
    """Unpacks one row into `out`.

    Raises:
        UserError: the `zstandard` package is missing.
        ValueError: the frame is damaged or of another size.
    """
    library = _library()
    try:
        data = library.ZstdDecompressor().decompress(frame.tobytes(), max_output_size=out.nbytes)
    except library.ZstdError as error:
        raise ValueError(str(error)) from None
    out.reshape(-1)[:] = np.frombuffer(data, out.dtype)


def _library() -> Any:
    try:
        import zstandard
    except ImportError:
        raise UserError(
            "algorithm.replay_buffer.compression=zstd needs the package zstandard, which is not "
            "installed. Run: pip install 'embodied_rl[zstd]'"
        ) from None
    return zstandard
