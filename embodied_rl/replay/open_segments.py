"""The segments of a store that are memory-mapped at present."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from embodied_rl.errors import UserError
from embodied_rl.replay.segment import SegmentFile

OPEN_FILES = 256  # memory maps held open; each holds a file descriptor


class OpenSegments:
    """Opens segments when they are asked for, and holds those that were used last.

    Args:
        folder: of the store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: OrderedDict[int, SegmentFile] = OrderedDict()

    def get(self, segment: int, name: str) -> SegmentFile:
        """Returns the file of the segment at a position.

        Raises:
            UserError: it is gone.
            DamagedError: it is not a whole segment.
        """
        file = self._files.get(segment)
        if file is None:
            path = self.folder / name
            try:
                file = SegmentFile(path)
            except FileNotFoundError:
                raise UserError(
                    f"{path} is gone: the run that writes {self.folder} evicted it meanwhile. "
                    "Open the folder again."
                ) from None
            self._files[segment] = file
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(segment)
        return file

    def drop(self, segment: int) -> None:
        """Lets go of one segment, if it is open."""
        self._files.pop(segment, None)

    def clear(self) -> None:
        """Lets go of all."""
        self._files.clear()
