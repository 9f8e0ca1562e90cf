"""Backbones that `embodied_rl.pretrain` can build and train."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from embodied_rl.interfaces.backbone import Backbone
from embodied_rl.types import Obs, Trajectory

if TYPE_CHECKING:
    from embodied_rl.command_configs import PretrainConfig


class Imitator(Backbone, ABC):
    """A backbone that learns from demonstrations.

    Attributes:
        keeps_inputs: whether `inputs` of all demonstrated steps are made once and kept; false:
            they take more memory than the observations, and are made for each batch.
        tuning_rate: learning rate for going on from trained weights.
    """

    keeps_inputs: bool = True
    tuning_rate: float = 3e-4

    @property
    def taught_steps(self) -> int:
        """Actions of a demonstrated chunk that `imitation_loss` reads.

        H, or more where the policy computes more than it executes.
        """
        return self.chunk_size

    @classmethod
    @abstractmethod
    def for_demos(
        cls,
        trajectories: Sequence[Trajectory],
        instructions: Sequence[str],
        config: PretrainConfig,
    ) -> Imitator:
        """Builds an untrained backbone for what demonstrations show.

        Args:
            trajectories: the training ones; normalisation comes from them.
            instructions: what their `obs.instruction`, an index, stands for.
            config: sizes.

        Raises:
            UserError: the demonstrations lack what it reads.
        """

    @abstractmethod
    def inputs(self, obs: Obs) -> Obs:
        """What `imitation_loss` reads of observations [B, ...].

        Whatever no training step changes (the features of a frozen tower) is computed here, once
        for every demonstrated step.
        """

    @abstractmethod
    def imitation_loss(
        self, inputs: Obs, chunks: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Returns the mean loss (scalar) of proposing the demonstrated chunks.

        Args:
            inputs: rows of what `inputs` returned.
            chunks: the actions demonstrated from there on, [B, `taught_steps`, A].
            generator: draws whatever noise the loss needs, on the CPU.
        """
