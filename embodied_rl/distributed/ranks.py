"""The processes of a run, and what they tell one another."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from embodied_rl.batch_renorm import BatchRenorm
from embodied_rl.distributed.presence import Presence
from embodied_rl.errors import RunStopped


class Ranks:
    """This process among those of the run.

    Without an initialised process group there is one, and nothing is communicated.

    Args:
        presence: tells whom a message waits for; None: nobody does.
        timeout: after which a message that does not arrive fails; None: as the group says.

    Attributes:
        timeout: the same.
        rank: of this process, from 0.
        world: how many there are.
    """

    def __init__(self, presence: Presence | None = None, timeout: timedelta | None = None) -> None:
        self._presence, self.timeout = presence, timeout
        ready = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if ready else 0
        self.world: int = dist.get_world_size() if ready else 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # process groups cannot be copied, nor need they be

    def state_dict(self) -> dict[str, int]:
        """How many there are."""
        return {"world": self.world}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Checks that there are as many.

        Raises:
            ValueError: another number.
        """
        if state["world"] != self.world:
            raise ValueError(
                f"it was written by {state['world']} processes, this run has {self.world}; "
                f"continue with torchrun --nproc_per_node={state['world']}."
            )

    def gather(self, tensor: Tensor) -> Tensor:
        """Stacks a tensor of every rank, in order: [...] to [world, ...]; no gradient."""
        if self.world == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        with self.naming():
            dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Says, where a message fails, which process did not come to it.

        Around what sends messages, a library's included.

        Raises:
            RunStopped: it failed.
        """
        try:
            yield
        except torch.OutOfMemoryError:  # a RuntimeError as well, and this process's own
            raise
        except RuntimeError as error:
            absent = [] if self._presence is None else self._presence.missing()
            who = ", ".join(absent) if absent else "another process"
            raise RunStopped(
                f"{who} did not answer: it failed, or took longer than train.rank_timeout "
                f"({str(error).splitlines()[0]})."
            ) from error

    def gather_json(self, value: Any) -> list[Any]:
        """A JSON value of every rank, in order."""
        if self.world == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = self.gather(torch.tensor([len(own)])).flatten().tolist()
        padded = torch.cat([own, own.new_zeros(max(lengths) - len(own))])
        rows = self.gather(padded)
        texts = [bytes(row[:n].tolist()) for row, n in zip(rows, lengths, strict=True)]
        return [json.loads(text) for text in texts]

    def all(self, flag: bool) -> bool:
        """Whether it is true on every rank."""
        return self._count(flag) == self.world

    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank."""
        return self._count(flag) > 0

    def _count(self, flag: bool) -> int:
        """On how many ranks it is true."""
        if self.world == 1:
            return int(flag)
        if self._presence is not None:
            self._presence.enter()
        count = torch.tensor(int(flag))
        with self.naming():
            dist.all_reduce(count)
        return int(count)

    def meet(self) -> None:
        """Waits until every rank is here."""
        self.gather_json(None)

    def means(self, values: dict[str, float]) -> dict[str, float]:
        """Means over the ranks that have a value of that name."""
        everywhere = self.gather_json(values)
        names = dict.fromkeys(name for each in everywhere for name in each)
        found = {name: [each[name] for each in everywhere if name in each] for name in names}
        return {name: sum(each) / len(each) for name, each in found.items()}

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their means over the ranks, in one message for each dtype."""
        if self.world == 1:
            return
        kinds = {(t.dtype, t.device) for t in tensors}
        for kind in sorted(kinds, key=str):
            group = [t for t in tensors if (t.dtype, t.device) == kind]
            flat = torch.cat([t.reshape(-1) for t in group])
            with self.naming():
                dist.all_reduce(flat)
            flat /= self.world
            for t, mean in zip(group, flat.split([t.numel() for t in group]), strict=True):
                t.copy_(mean.view_as(t))

    def share_statistics(self, module: nn.Module) -> None:
        """Makes each Batch Renormalisation in a module take its moments over all ranks."""
        if self.world > 1:
            for layer in module.modules():
                if isinstance(layer, BatchRenorm):
                    layer.gather = self.gather
