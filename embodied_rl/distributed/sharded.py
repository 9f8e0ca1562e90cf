"""Updates whose optimiser is shared out: each process owns a part of the moments."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence

from torch import Tensor

from embodied_rl.distributed.ddp import DdpEngine
from embodied_rl.distributed.local import LocalEngine, LocalTrainable
from embodied_rl.distributed.optimised import Optimised
from embodied_rl.interfaces import Trainable

SMALL = 1024  # numbers: below, messages cost more than the moments that they would spare


class ShardedEngine(DdpEngine):
    """Shards gradients and moments of all that is large, and averages gradients of the rest.

    Weights stay whole on every process: acting, evaluating (not as many forwards on each process)
    and the other losses run through them without a message.
    """

    def _optimise(self, name: str, parameters: list, config: object) -> Optimised:
        if sum(p.numel() for p in parameters) < SMALL:  # the temperature is a single number
            return super()._optimise(name, parameters, config)
        return self._shard(name, parameters, config)

    @abstractmethod
    def _shard(self, name: str, parameters: list, config: object) -> Optimised:
        """Builds what owns this process's part, and averages gradients in its `step`."""

    def _gradients(
        self, trainable: Trainable, loss: Tensor | Iterable[Tensor], inputs: Sequence[Tensor]
    ) -> list[Tensor]:
        if isinstance(trainable, LocalTrainable):
            return super()._gradients(trainable, loss, inputs)
        return LocalEngine._gradients(self, trainable, loss, inputs)
