"""Turns a step of the learner into one CUDA graph: hundreds of kernels, one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from embodied_rl.nests import mapped, tensors_of

Result = TypeVar("Result")
WARM_UP = 3  # calls before the recording: libraries choose kernels and allocate in the first ones


class Graphed(Generic[Result]):
    """Runs a function a few times as it is, then records it and replays the recording.

    A recording knows addresses, not names. So parameters, statistics and moments must stay where
    they are and be changed in place (tests/test_cuda_graphs.py), arguments are copied to where the
    recording reads them, and results are copied from where it writes them. Noise is new at every
    replay: torch moves the generator's offset.

    Args:
        function: of tensors and dataclasses of them, always of the same sizes and settings, which
            reads no number on the host. Returns tensors, or a dictionary of them.
    """

    def __init__(self, function: Callable[..., Result]) -> None:
        self._function, self._calls = function, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._result: Any = None

    def __call__(self, *args: Any) -> Result:
        """Calls the function, or replays it."""
        with torch.cuda.device(tensors_of(args)[0].device):  # streams are the present device's
            return self._call(args)

    def _call(self, args: tuple[Any, ...]) -> Result:
        if self._graph is None and self._calls < WARM_UP:
            self._calls += 1
            return self._aside(args)
        if self._graph is None:
            self._record(args)
        assert self._graph is not None
        torch.ops.aten._foreach_copy_(self._inputs, tensors_of(args))
        self._graph.replay()
        return mapped(self._result, Tensor.clone)

    def _aside(self, args: tuple[Any, ...]) -> Result:
        """Calls it on another stream, as recording will."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = self._function(*args)
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def _record(self, args: tuple[Any, ...]) -> None:
        """Records a call without making it."""
        kept = mapped(args, Tensor.clone)
        self._inputs = tensors_of(kept)
        graph = torch.cuda.CUDAGraph()
        # a thread that reads batches ahead may use the GPU meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._result = self._function(*kept)
        self._graph = graph
