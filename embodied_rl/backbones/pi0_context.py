"""What π0 keeps of an observation while it turns noise into chunks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import DynamicCache


@dataclass
class Pi0Context:
    """What denoising reads of an observation. P prefix tokens, L layers. Never changed.

    Attributes:
        keys: L tensors [B, heads, P, size], of the prefix.
        values: L tensors [B, heads, P, size].
        mask: [B, P] int64, zero for padding.
        state: [B, S] normalised and padded state.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor
    state: Tensor

    def cache(self) -> DynamicCache:
        """Returns a new cache of the prefix, for one step: the step appends to it."""
        return DynamicCache(list(zip(self.keys, self.values, strict=True)))

    def repeat(self, times: int) -> Pi0Context:
        """Returns the context with each row `times` times."""

        def rows(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(times, 0)

        keys, values = tuple(map(rows, self.keys)), tuple(map(rows, self.values))
        return Pi0Context(keys, values, rows(self.mask), rows(self.state))
