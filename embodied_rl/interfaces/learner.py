"""Critics, the optimiser steps on them, and what a checkpoint saves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from embodied_rl.config import AlgorithmConfig, CriticConfig


@runtime_checkable
class Stateful(Protocol):
    """Anything a checkpoint saves: nested dicts of tensors and JSON values."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state to save."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Restores what `state_dict` returned."""
        ...


class QHead(nn.Module, ABC):
    """The critic ensemble and its way of bootstrapping: where CrossQ and SAC differ."""

    unused_keys: ClassVar[tuple[str, ...]] = ()  # config keys that this head has no use for

    def __init__(
        self, feature_dim: int, action_size: int, critic: CriticConfig, algorithm: AlgorithmConfig
    ) -> None:
        """The signature every head has: features [B, D], flattened chunks [B, H * A]."""
        super().__init__()

    @abstractmethod
    def td_pair(
        self, x: Tensor, action: Tensor, next_x: Tensor, next_action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Evaluates a batch of transitions for the TD loss.

        Args:
            x: [B, D] features.
            action: [B, H, A].
            next_x: [B, D] features of the next state.
            next_action: [B, H, A] chosen there by the present policy.

        Returns:
            q [K, B] with gradient and next_q [K, B] without.
        """

    @abstractmethod
    def score(self, x: Tensor, action: Tensor) -> Tensor:
        """Returns Q [K, B] for the actor loss; leaves every statistic untouched."""

    @abstractmethod
    def critic_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters that the critic's optimiser owns."""

    @abstractmethod
    def after_update(self) -> None:
        """Runs after each critic step (Polyak averaging in the default head)."""


class Trainable(Protocol):
    """A group of parameters with its optimiser, as an engine sees it."""

    parameters: list[nn.Parameter]

    @property
    def learning_rate(self) -> float:
        """The present learning rate."""
        ...


class UpdateEngine(ABC):
    """Backward, average over ranks, clip and step, for one module's own parameters."""

    @abstractmethod
    def attach(self, name: str, parameters: Iterable[nn.Parameter], config: Any) -> Trainable:
        """Builds an optimiser over `parameters` as `config` (an OptimConfig) says."""

    @abstractmethod
    def step(
        self, trainable: Trainable, loss: Tensor | Iterable[Tensor], inputs: Sequence[Tensor] = ()
    ) -> Tensor:
        """Takes one optimiser step.

        Args:
            trainable: whose parameters move.
            loss: scalar; or several, made one after the other, whose sum is meant: each one's graph
                is gone before the next is made.
            inputs: tensors whose `.grad` is wanted too.

        Returns:
            The gradient norm of the parameters before clipping.
        """

    @abstractmethod
    def set_progress(self, progress: float) -> None:
        """Moves every learning-rate schedule to the share of the run that is over."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Whole optimiser moments by trainable; all processes ask for them at the same time."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores optimiser moments."""


def aggregate(q: Tensor, how: str) -> Tensor:
    """Reduces Q [K, B] over the critics to [B]: their `how`, min or mean."""
    return q.min(0).values if how == "min" else q.mean(0)
