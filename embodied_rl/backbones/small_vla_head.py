"""The trained parts of the small VLA: reading a feature map, and a flow over action chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embodied_rl.nn import mlp


class MapReader(nn.Module):
    """A tower's map to a vector: where learned features are (keypoints), and a linear summary.

    The keypoints are spatial-softmax expectations (Levine et al. 2016, equation 8).

    Args:
        channels: C of the map.
        keypoints: P, points found in it.
        summary: S, entries of the summary.
        grid: rows and columns of the map.
    """

    WIDTH, SQUEEZED = 32, 8
    row: Tensor
    column: Tensor

    def __init__(self, channels: int, keypoints: int, summary: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.size = 2 * keypoints + summary
        self.norm = nn.GroupNorm(1, channels)
        self.mix = nn.Sequential(
            nn.Conv2d(channels, self.WIDTH, 1),
            nn.ReLU(),
            nn.Conv2d(self.WIDTH, self.WIDTH, 3, padding=1),
            nn.ReLU(),
        )
        self.points = nn.Conv2d(self.WIDTH, keypoints, 1)
        self.squeeze = nn.Conv2d(self.WIDTH, self.SQUEEZED, 1)
        self.summary = nn.Linear(self.SQUEEZED * grid[0] * grid[1], summary)
        rows, columns = (torch.linspace(-1, 1, n) for n in grid)
        self.register_buffer("row", rows.repeat_interleave(grid[1]))
        self.register_buffer("column", columns.repeat(grid[0]))

    def forward(self, maps: Tensor) -> Tensor:
        """Returns vectors [B, 2 P + S] of maps [B, C, rows, columns]."""
        # contiguous: backward of GroupNorm crashes torch 2.13 on a CPU with channels last
        mixed = self.mix(self.norm(maps.contiguous()))
        weights = self.points(mixed).flatten(2).softmax(-1)
        summary = self.summary(self.squeeze(mixed).flatten(1))
        return torch.cat([weights @ self.column, weights @ self.row, summary.tanh()], dim=1)


class VelocityField(nn.Module):
    """Velocity of an action chunk on its way from noise, given features and time.

    Args:
        feature_dim: D.
        chunk: numbers of a chunk, H * A.
        hidden: widths of the MLP.
    """

    FREQUENCIES = 8
    frequency: Tensor

    def __init__(self, feature_dim: int, chunk: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.net = mlp(feature_dim + chunk + 2 * self.FREQUENCIES, hidden, chunk)
        frequency = math.pi * 2.0 ** torch.arange(self.FREQUENCIES) / 4
        self.register_buffer("frequency", frequency)

    def forward(self, vector: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """Returns velocities [B, H A] for features [B, D], chunks [B, H A] and times [B]."""
        angle = time[:, None] * self.frequency
        return self.net(torch.cat([vector, noisy, angle.sin(), angle.cos()], dim=1))
