"""What of a store turns out to be damaged, and how that is told."""

from __future__ import annotations

CORRUPT = ".corrupt"  # suffix of segments that a writer set aside


class DamagedError(Exception):
    """A segment's bytes are not what was written; the message says what is wrong."""


class LostError(Exception):
    """Trajectories turned out to be damaged when they were read.

    Attributes:
        numbers: theirs.
    """

    def __init__(self, numbers: list[int]) -> None:
        super().__init__(f"trajectories {numbers} are damaged")
        self.numbers = numbers
