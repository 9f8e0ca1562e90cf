"""Parameters with their optimiser, wherever its parts may lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from embodied_rl.interfaces import Trainable
from embodied_rl.schedules import learning_rate

Moments = dict[int, dict[str, Tensor]]  # by parameter position, named as torch's optimisers do


class Optimised(Trainable, ABC):
    """One group of parameters under Adam, or AdamW where there is weight decay.

    Between steps the parameters are ordinary tensors, whole on every process, whoever owns the
    moments: acting, evaluating and saving know nothing of engines. Whatever is written into them
    from outside (a checkpoint) is what the next step starts from.

    Args:
        name: that it was attached under.
        parameters: those that move.
        config: an OptimConfig.
    """

    def __init__(self, name: str, parameters: Iterable[nn.Parameter], config: Any) -> None:
        self.name = name
        self.parameters = list(parameters)
        self.config = config
        # the temperature has neither betas nor weight decay of its own
        full = hasattr(config, "betas")
        self.betas: tuple[float, float] = tuple(config.betas) if full else (0.9, 0.999)
        self.weight_decay: float = config.weight_decay if full else 0.0

    @abstractmethod
    def step(self, gradients: list[Tensor]) -> Tensor:
        """Clips and takes one step.

        Args:
            gradients: of the parameters, whole; the list is emptied where memory is saved by it.

        Returns:
            Their norm before clipping.
        """

    def set_progress(self, progress: float) -> None:
        """Sets the learning rate for the share of the run that is over."""
        config = self.config
        self.set_rate(learning_rate(config.lr_scheduler, config.lr, config.final_lr, progress))

    @abstractmethod
    def set_rate(self, rate: float) -> None:
        """Sets the learning rate."""

    @abstractmethod
    def state_dict(self) -> Moments:
        """Whole moments; where they are shared out, all processes must ask at the same time."""

    @abstractmethod
    def load_state_dict(self, state: dict[Any, dict[str, Tensor]]) -> None:
        """Restores them; no entries for a trainable that never took a step."""


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together."""
    if torch.compiler.is_compiling():  # the compiler fuses sums, not one operation on a list
        return torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    return torch.nn.utils.get_total_norm(gradients)


def clipped(gradients: list[Tensor], norm: Tensor, limit: float | None) -> list[Tensor]:
    """Gradients scaled as torch.nn.utils.clip_grad_norm_ does; None: as they are."""
    if limit is None:
        return gradients
    share = (limit / (norm + 1e-6)).clamp(max=1.0)
    return [gradient * share for gradient in gradients]


class HandOver(torch.autograd.Function):
    """A scalar whose gradients are those that were given, without copies of them.

    FSDP and DeepSpeed reduce what arrives in a backward pass. Ours is over by then: a loss may go
    through modules that must not learn from it, or come in pieces. So the finished gradients are
    sent through a second, empty pass, whose only work is theirs.
    """

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        """Zero."""
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *of_output: Any) -> Any:
        """The gradients; the list is empty afterwards, so that each is freed once it is used."""
        handed = tuple(ctx.gradients)
        ctx.gradients.clear()
        return None, *handed
