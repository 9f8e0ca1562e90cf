"""Updates whose optimiser is shared out: each process owns a part of the moments."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from embodied_rl.distributed.ddp import DdpEngine
from embodied_rl.distributed.local import LocalEngine, LocalTrainable
from embodied_rl.distributed.optimised import Optimised
from embodied_rl.distributed.ranks import Ranks
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
        trainable = self._shard(name, parameters, config)
        share_timeout(self.ranks)
        return trainable

    def step(
        self, trainable: Trainable, loss: Tensor | Iterable[Tensor], inputs: Sequence[Tensor] = ()
    ) -> Tensor:
        """As on one process; a process that does not come to the library's messages is named."""
        assert isinstance(trainable, Optimised)
        gradients = self._gradients(trainable, loss, inputs)
        with self.ranks.naming():
            return trainable.step(gradients)

    def state_dict(self) -> dict[str, Any]:
        """Whole moments; all processes must ask at the same time."""
        with self.ranks.naming():
            return super().state_dict()

    @abstractmethod
    def _shard(self, name: str, parameters: list, config: object) -> Optimised:
        """Builds what owns this process's part, and averages gradients in its `step`."""

    def _gradients(
        self, trainable: Trainable, loss: Tensor | Iterable[Tensor], inputs: Sequence[Tensor]
    ) -> list[Tensor]:
        if isinstance(trainable, LocalTrainable):
            return super()._gradients(trainable, loss, inputs)
        return LocalEngine._gradients(self, trainable, loss, inputs)


def share_timeout(ranks: Ranks) -> None:
    """Gives all groups the run's timeout: those that a library makes wait for half an hour."""
    if ranks.timeout is not None:
        for group in list(c10d._world.pg_map):  # torch has no public way, and they no argument
            c10d._set_pg_timeout(ranks.timeout, group)
