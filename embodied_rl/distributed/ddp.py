"""Data-parallel updates: every process has all weights and a share of the batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from embodied_rl.distributed.local import LocalEngine
from embodied_rl.distributed.ranks import Ranks
from embodied_rl.interfaces import Trainable


class DdpEngine(LocalEngine):
    """Averages gradients over the ranks before clipping, so the norm is that of the whole batch.

    Each rank's loss is a mean over its equal share of the global batch, so the averaged gradient is
    that of the mean over the global batch. The losses call modules in several ways (two critics'
    passes, the actor's through frozen critics), which torch's wrapper around one `forward` does not
    fit: gradients are averaged here in one message instead.

    Args:
        ranks: the processes.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks

    def _gradients(
        self, trainable: Trainable, loss: Tensor | Iterable[Tensor], inputs: Sequence[Tensor]
    ) -> list[Tensor]:
        gradients = super()._gradients(trainable, loss, inputs)
        self.ranks.average_(gradients)
        return gradients
