"""Counts what a piece of torch code would do: operations, bytes held, weights read, kernels."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry


class Meter(TorchDispatchMode):
    """Watches every operator while it is active; meant for tensors on the meta device.

    A multiply-add is two floating-point operations; counted are matrix products, convolutions and
    attention, by torch's own formulas (`torch.utils.flop_counter`), forward and backward.

    `peak` is exact for eager execution but for the allocator's rounding: every storage counts from
    the operator that makes it until nothing refers to it. Attention on the meta device keeps its
    scores, which fused kernels do not: where they run, `peak` is an upper bound.

    Args:
        weights: parameters whose reading by counted operators is added up.

    Attributes:
        flops: floating-point operations.
        kernels: operators that write something: at least one launch each on a GPU.
        weight_bytes: of the weights that products read, each time that one does.
        held: bytes made under this meter that are still referred to.
        peak: the most that `held` ever was.
    """

    def __init__(self, weights: Iterable[nn.Parameter] = ()) -> None:
        super().__init__()
        self.flops = self.kernels = self.weight_bytes = self.held = self.peak = 0
        self._weights = {w.untyped_storage()._cdata for w in weights}
        self._seen: dict[int, weakref.ref[Any]] = {}

    def reset(self) -> None:
        """Starts counting anew; what is held stays held, and is where the peak starts."""
        self.flops = self.kernels = self.weight_bytes = 0
        self.peak = self.held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operator and notes it."""
        kwargs = kwargs or {}
        inputs = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        for tensor in inputs:
            self._meet(tensor, 0)  # made before: not this meter's
        result = func(*args, **kwargs)
        made = False
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                made |= self._meet(tensor, tensor.untyped_storage().nbytes())
        self.kernels += made or func._schema.is_mutable
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **kwargs, out_val=result))
            read = (t for t in inputs if t.untyped_storage()._cdata in self._weights)
            self.weight_bytes += sum(t.numel() * t.element_size() for t in read)
        return result

    def _meet(self, tensor: Tensor, size: int) -> bool:
        """Notes a storage; returns whether it is a new one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return False

        def gone(_: object) -> None:
            del self._seen[key]
            self.held -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.held += size
        self.peak = max(self.peak, self.held)
        return True
