"""LeRobot's normalisation of one feature: mean/std, min/max, quantiles or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embodied_rl.errors import UserError

# mode -> names of the two statistics it reads
MODES: dict[str, tuple[str, ...]] = {
    "IDENTITY": (),
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}


class Normaliser(nn.Module):
    """Normalises a feature and back as LeRobot's `normalizer_processor` does.

    MEAN_STD: (x - mean) / (std + eps), back x std + mean. The others map the interval between two
    statistics to [-1, 1]; where the two are equal their difference is taken as eps.

    Statistics belong to the configuration (`config_dict`), not to the weights: the buffers are not
    part of the state dict.

    Args:
        mode: one of `MODES`.
        first: [n] mean or lower bound; empty for IDENTITY.
        second: [n] standard deviation or upper bound; empty for IDENTITY.
        eps: as above.
    """

    first: Tensor
    second: Tensor

    def __init__(
        self,
        mode: str = "IDENTITY",
        first: Sequence[float] = (),
        second: Sequence[float] = (),
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise UserError(f"normalisation {mode!r} is unknown. Allowed: {', '.join(MODES)}.")
        if len(first) != len(second) or (mode != "IDENTITY") != bool(len(first)):
            raise UserError(
                f"normalisation {mode} got statistics of {len(first)} and {len(second)} entries: "
                "both must have the feature's size (IDENTITY: none)."
            )
        self.mode, self.eps = mode, float(eps)
        self._lists = [float(v) for v in first], [float(v) for v in second]
        self.register_buffer("first", torch.tensor(self._lists[0]), persistent=False)
        self.register_buffer("second", torch.tensor(self._lists[1]), persistent=False)

    @property
    def size(self) -> int | None:
        """n; None where there are no statistics and any size goes."""
        return len(self._lists[0]) or None

    def normalise(self, x: Tensor) -> Tensor:
        """Normalises [..., n]."""
        if self.mode == "IDENTITY":
            return x
        x = x.to(self.first.dtype)
        if self.mode == "MEAN_STD":
            return (x - self.first) / (self.second + self.eps)
        return 2 * (x - self.first) / self._width() - 1

    def unnormalise(self, x: Tensor) -> Tensor:
        """The way back, for [..., n]."""
        if self.mode == "IDENTITY":
            return x
        if self.mode == "MEAN_STD":
            return x * self.second + self.first
        return (x + 1) / 2 * self._width() + self.first

    def _width(self) -> Tensor:
        width = self.second - self.first
        return torch.where(width == 0, torch.full_like(width, self.eps), width)

    def config_dict(self) -> dict[str, Any]:
        """The constructor's arguments."""
        first, second = self._lists
        return {"mode": self.mode, "first": first, "second": second, "eps": self.eps}

    @classmethod
    def from_statistics(
        cls, mode: str, statistics: Mapping[str, Tensor], eps: float, what: str
    ) -> Normaliser:
        """Takes the statistics that a mode needs from those of a feature.

        Args:
            mode: one of `MODES`.
            statistics: name to [n], as in LeRobot's files.
            eps: see above.
            what: the feature and its file, for messages.

        Raises:
            UserError: an unknown mode, or a statistic is missing.
        """
        if mode not in MODES:
            raise UserError(f"{what}: normalisation {mode!r}. Allowed: {', '.join(MODES)}.")
        names = MODES[mode]
        missing = [name for name in names if name not in statistics]
        if missing:
            raise UserError(
                f"{what}: normalisation {mode} needs {' and '.join(names)}, but the statistics are "
                f"{', '.join(sorted(statistics)) or 'absent'}. Write the folder again with "
                "LeRobot after computing them for the dataset."
            )
        return cls(mode, *(statistics[name].flatten().tolist() for name in names), eps=eps)
