"""An update engine on the meta device: gradients and Adam moments with sizes, but no numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embodied_rl.interfaces import Trainable, UpdateEngine


class Account(Trainable):
    """Parameters with a gradient and two moments each.

    Args:
        parameters: those that one optimiser owns.
        config: its settings.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: Any) -> None:
        self.parameters, self.config = list(parameters), config

    @property
    def learning_rate(self) -> float:
        """The first one."""
        return float(self.config.lr)

    @property
    def count(self) -> int:
        """Numbers in the parameters."""
        return sum(p.numel() for p in self.parameters)

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters: as many as of their gradients and of each Adam moment."""
        return sum(p.numel() * p.element_size() for p in self.parameters)


class LedgerEngine(UpdateEngine):
    """Goes backward as `distributed.LocalEngine` does, and leaves out the optimiser's step.

    Fused Adam needs no memory but its moments, and they are known: two of each parameter's size.

    Attributes:
        accounts: by the name that they were attached under.
    """

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}

    def attach(self, name: str, parameters: Iterable[nn.Parameter], config: Any) -> Account:
        """Opens an account."""
        self.accounts[name] = Account(parameters, config)
        return self.accounts[name]

    def step(
        self, trainable: Trainable, loss: Tensor | Iterable[Tensor], inputs: Sequence[Tensor] = ()
    ) -> Tensor:
        """Leaves the gradients where `LocalEngine` leaves them; nothing moves."""
        wanted = [*trainable.parameters, *inputs]
        gradients: list[Tensor] = []
        for part in [loss] if isinstance(loss, Tensor) else loss:
            found = torch.autograd.grad(part, wanted)
            if gradients:
                found = [a + b for a, b in zip(gradients, found, strict=True)]
            gradients = list(found)
        for value, gradient in zip(wanted, gradients, strict=True):
            value.grad = gradient
        return torch.nn.utils.get_total_norm(gradients[: len(trainable.parameters)])

    def set_progress(self, progress: float) -> None:
        """Nothing moves."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
