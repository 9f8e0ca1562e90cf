"""Training a backbone through the features that the critic read, a few observations at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from embodied_rl.config import PolicyConfig
from embodied_rl.interfaces import Backbone, UpdateEngine
from embodied_rl.types import Obs


class TrainedBackbone:
    """The part of a backbone that training may change.

    The losses see the features of the whole batch, made without a graph; their gradient comes here,
    and the observations are encoded again, `micro_batch` of them at a time, with a graph. So
    memory is bounded by the piece, while Batch Renormalisation still sees the whole batch, and the
    gradient is that of one pass. The critic's loss is what trains it, through the features of the
    present observation: those of the next one belong to the target.

    Args:
        backbone: the policy.
        parameters: those of its parameters that move.
        engine: takes the optimiser steps.
        config: `optim` and `micro_batch`.
    """

    def __init__(
        self,
        backbone: Backbone,
        parameters: list[nn.Parameter],
        engine: UpdateEngine,
        config: PolicyConfig,
    ) -> None:
        self.backbone, self.engine, self.rows = backbone, engine, config.micro_batch
        self.parameters = parameters
        self.trainable = engine.attach("backbone", parameters, config.optim)

    def step(self, obs: Obs, gradient: Tensor) -> Tensor:
        """Takes one optimiser step.

        Args:
            obs: observations [B, ...].
            gradient: of the loss, with respect to their features [B, D].

        Returns:
            The norm of the parameters' gradient before clipping.
        """
        return self.engine.step(self.trainable, self._pieces(obs, gradient))

    def _pieces(self, obs: Obs, gradient: Tensor) -> Iterator[Tensor]:
        """Scalars whose gradients sum to that of the loss, each with a graph of its own."""
        self.backbone.eval()
        rows = self.rows or len(gradient)
        for start in range(0, len(gradient), rows):
            piece = slice(start, start + rows)
            features = self.backbone({k: v[piece] for k, v in obs.items()}, 0)
            yield (features.vector * gradient[piece]).sum()

    def state_dict(self) -> dict[str, Any]:
        """The trained weights, by position."""
        return {str(i): p.detach() for i, p in enumerate(self.parameters)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores them."""
        for i, parameter in enumerate(self.parameters):
            parameter.copy_(state[str(i)])
