"""A running average of a network's weights."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

Network = TypeVar("Network", bound=nn.Module)


class WeightAverage(Generic[Network]):
    """average <- decay * average + (1 - decay) * weights, once per `update`.

    The weights of a policy under constant learning rates circle around a good point; their average
    sits closer to it (Polyak and Juditsky 1992). torch's `AveragedModel` reads a counter from the
    device in each update, which this does without.

    Args:
        source: the network that is trained.
        decay: weight of the old average; 0 follows the source exactly.
    """

    def __init__(self, source: Network, decay: float) -> None:
        self.source = source
        self.module: Network = copy.deepcopy(source).requires_grad_(False).eval()
        self._lerp = get_ema_multi_avg_fn(decay)
        self._mine, self._theirs = _tensors(self.module), _tensors(source)

    def update(self) -> None:
        """Moves the average towards the source; buffers (statistics, counters) are copied."""
        (mine, copies), (theirs, originals) = self._mine, self._theirs
        self._lerp(mine, theirs, 0)
        for copied, original in zip(copies, originals, strict=True):
            copied.copy_(original)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores them."""
        self.module.load_state_dict(state)


def _tensors(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and buffers, looked up once."""
    return list(module.parameters()), list(module.buffers())
