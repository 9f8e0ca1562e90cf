"""Sharded updates with torch's FSDP2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from embodied_rl.distributed.local import LocalTrainable
from embodied_rl.distributed.optimised import HandOver, Moments, Optimised, clipped
from embodied_rl.distributed.ranks import Ranks
from embodied_rl.distributed.sharded import ShardedEngine

BUCKET = 2**25  # numbers that travel together: what a message needs beside the weights


class Bucket(nn.Module):
    """Some of a trainable's parameters, flat, for `fully_shard` to share out evenly.

    FSDP wraps these and not the networks: those are called in several ways, by one another's
    losses and while acting, and their state is saved; FSDP's hooks, which gather, reduce and turn
    parameters into DTensors, would fire in all of these places.
    """

    def __init__(self, originals: list[nn.Parameter]) -> None:
        super().__init__()
        self.originals = originals  # a plain list: not parameters of this module
        self.flat = nn.ParameterList(nn.Parameter(p.detach().reshape(-1)) for p in originals)

    def forward(self, gradients: list[Tensor]) -> Tensor:
        """A scalar whose gradients are the given ones."""
        return HandOver.apply(gradients, *self.flat)  # type: ignore[return-value]


class Shard:
    """A bucket under FSDP: this process's part of it, and the whole weights.

    The networks' parameters share the memory of FSDP's gathered ones, so that gathering them is
    what moves the networks.

    Args:
        originals: the networks' parameters, of one dtype.
        mesh: the processes.
        offload: whether the part lives in the host's memory.
    """

    def __init__(self, originals: list[nn.Parameter], mesh: DeviceMesh, offload: bool) -> None:
        self.originals, self.mesh = originals, mesh
        pinned = originals[0].is_cuda
        policy = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()
        bucket = Bucket(originals)
        fully_shard(bucket, mesh=mesh, reshard_after_forward=False, offload_policy=policy)
        assert isinstance(bucket, FSDPModule)
        bucket.set_reshard_after_backward(False)
        self._bucket = bucket
        self._sharded = [p for p in bucket.parameters() if isinstance(p, DTensor)]
        bucket.unshard()  # its first one may move the parts to where they stay
        self.parts = [nn.Parameter(p.to_local().detach()) for p in self._sharded]
        for original, whole in zip(originals, bucket.parameters(), strict=True):
            original.data = whole.data.view(original.shape)

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes the part from the weights, which somebody may have loaded."""
        for original, part in zip(self.originals, self.parts, strict=True):
            part.copy_(self.mine(original.reshape(-1)))

    def reduce(self, gradients: list[Tensor]) -> list[Tensor]:
        """Averages whole gradients over the processes; returns this one's part of them."""
        flat = [gradient.reshape(-1) for gradient in gradients]
        gradients.clear()
        self._bucket(flat).backward()
        reduced = []
        for parameter in self._sharded:
            assert isinstance(parameter.grad, DTensor)
            reduced.append(parameter.grad.to_local())
            parameter.grad = None
        return reduced

    def publish(self) -> None:
        """Sends every part to all processes, into their weights."""
        self._bucket.reshard()
        self._bucket.unshard()

    def mine(self, flat: Tensor) -> Tensor:
        """This process's part of what has a number for each of a parameter."""
        size = -(-len(flat) // self.mesh.size())
        start = min(self.mesh.get_local_rank() * size, len(flat))
        return flat[start : start + size]


class FsdpTrainable(Optimised):
    """Parameters whose gradients, moments and moving copies FSDP2 shares out.

    Args:
        name: that it was attached under.
        parameters: those that move.
        config: an OptimConfig.
        ranks: the processes.
        offload: whether parts and moments live in the host's memory.
    """

    def __init__(
        self, name: str, parameters: list[nn.Parameter], config: Any, ranks: Ranks, offload: bool
    ) -> None:
        super().__init__(name, parameters, config)
        self.ranks = ranks
        mesh = init_device_mesh(self.parameters[0].device.type, (ranks.world,))
        self._buckets = list(buckets(self.parameters))
        self._shards = [
            Shard([self.parameters[i] for i in positions], mesh, offload)
            for positions in self._buckets
        ]
        self._order = [i for positions in self._buckets for i in positions]
        # the optimiser of this process's part is that of a process alone
        self._own = LocalTrainable(name, [p for s in self._shards for p in s.parts], config)

    def step(self, gradients: list[Tensor]) -> Tensor:
        """Averages gradients part by part, clips by the norm of all parts, steps and gathers."""
        reduced: list[Tensor] = []
        for positions, shard in zip(self._buckets, self._shards, strict=True):
            shard.refresh()
            reduced += shard.reduce([gradients[i] for i in positions])
        gradients.clear()
        norm = self.ranks.gather(torch.nn.utils.get_total_norm(reduced)).norm()
        self._own.apply(clipped(reduced, norm, self.config.clip_grad))
        for shard in self._shards:
            shard.publish()
        return norm.to(self.parameters[0].device)

    @property
    def learning_rate(self) -> float:
        """The present one."""
        return self._own.learning_rate

    def set_rate(self, rate: float) -> None:
        """Sets the learning rate."""
        self._own.set_rate(rate)

    @property
    def held(self) -> int:
        """Bytes of moments on this process."""
        tensors = [*self._own.exp_avgs, *self._own.exp_avg_sqs]
        return sum(t.numel() * t.element_size() for t in tensors)

    def state_dict(self) -> Moments:
        """Whole moments, in the host's memory; all processes must ask at the same time."""
        own, whole = self._own.state_dict(), {}
        for at, i in enumerate(self._order):
            entry = own[at]
            whole[i] = {
                "step": entry["step"],
                "exp_avg": self._whole(i, entry["exp_avg"]),
                "exp_avg_sq": self._whole(i, entry["exp_avg_sq"]),
            }
        return {i: whole[i] for i in sorted(whole)}

    def _whole(self, position: int, part: Tensor) -> Tensor:
        parameter = self.parameters[position]
        count = parameter.numel()
        size = -(-count // self.ranks.world)
        padded = part.new_zeros(size)
        padded[: len(part)] = part
        return self.ranks.gather(padded).flatten()[:count].view(parameter.shape).cpu()

    def load_state_dict(self, state: dict[Any, dict[str, Tensor]]) -> None:
        """Restores this process's part of whole moments."""
        saved = {int(position): entry for position, entry in state.items()}
        shard, parts = self._shards[0], {}
        for at, i in enumerate(self._order if saved else ()):
            parts[at] = {
                name: tensor if name == "step" else shard.mine(tensor.reshape(-1))
                for name, tensor in saved[i].items()
            }
        self._own.load_state_dict(parts)


class FsdpEngine(ShardedEngine):
    """Gradients, moments and the copies that the optimiser moves, each shared out by FSDP2.

    Args:
        ranks: the processes.
        offload: whether the optimiser's part lives, and steps, in the host's memory.
    """

    def __init__(self, ranks: Ranks, offload: bool = False) -> None:
        super().__init__(ranks)
        self.offload = offload

    def _shard(self, name: str, parameters: list[nn.Parameter], config: Any) -> FsdpTrainable:
        return FsdpTrainable(name, parameters, config, self.ranks, self.offload)


def buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[int]]:
    """Positions of parameters of one dtype each, `BUCKET` numbers or a parameter at a time."""
    open_: dict[torch.dtype, list[int]] = {}
    counts: dict[torch.dtype, int] = {}
    for i, parameter in enumerate(parameters):
        kind, count = parameter.dtype, parameter.numel()
        if kind in open_ and counts[kind] + count > BUCKET:
            yield open_.pop(kind)
        open_.setdefault(kind, []).append(i)
        counts[kind] = count + (counts[kind] if len(open_[kind]) > 1 else 0)
    yield from open_.values()
