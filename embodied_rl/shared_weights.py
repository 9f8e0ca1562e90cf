"""The weights that training moves, in memory that learner and collecting process share."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from embodied_rl.policy import Policy

ALIGNED = 64  # bytes; also the size of the head, which holds the version


class SharedWeights:
    """One copy of a policy's moving weights: the learner publishes, the collecting process loads.

    The memory belongs to no file: it ends with the processes, however they end. A record lock,
    which a process that dies lets go, keeps a reader from seeing half of an update.

    Args:
        policy: whose weights are published, or loaded into.
        handle: file descriptor of the memory; None: it is made here.

    Attributes:
        layout: name, shape and type of each tensor; both sides must have the same.
    """

    def __init__(self, policy: Policy, handle: int | None = None) -> None:
        self.policy = policy
        tensors = moving(policy)
        self.layout = [[name, list(t.shape), str(t.dtype)] for name, t in tensors.items()]
        starts, size = [], ALIGNED
        for t in tensors.values():
            starts.append(size)
            size += -(-t.nbytes // ALIGNED) * ALIGNED
        self.handle = os.memfd_create("embodied_rl_weights") if handle is None else handle
        if handle is None:
            os.ftruncate(self.handle, size)
        flat = torch.frombuffer(mmap.mmap(self.handle, size), dtype=torch.uint8)
        self._version = flat[:8].view(torch.int64)
        self._slots = {
            name: flat[start : start + t.nbytes].view(t.dtype).view(t.shape)
            for (name, t), start in zip(tensors.items(), starts, strict=True)
        }
        self._loaded: int | None = None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        fcntl.lockf(self.handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self.handle, fcntl.LOCK_UN)

    def publish(self, version: int) -> None:
        """Copies the policy's present weights into the memory."""
        with self._alone():
            for name, tensor in moving(self.policy).items():
                self._slots[name].copy_(tensor)
            self._version.fill_(version)

    def load(self) -> int:
        """Takes over what was published last; returns its version."""
        with self._alone():
            version = int(self._version)
            if version != self._loaded:
                for name, tensor in moving(self.policy).items():
                    tensor.copy_(self._slots[name])
                self._loaded = version
        return version


def moving(policy: Policy) -> dict[str, Tensor]:
    """What training changes of a policy, by name: its actor, its judge, backbone weights."""
    tensors: dict[str, Tensor] = {}
    for owner in ("actor", "judge"):
        module = getattr(policy, owner)
        state = {} if module is None else module.state_dict()
        tensors |= {f"{owner}.{name}": tensor for name, tensor in state.items()}
    trained = {id(p) for p in policy.trained_parameters()}
    tensors |= {
        f"backbone.{name}": parameter.detach()
        for name, parameter in policy.backbone.named_parameters()
        if id(parameter) in trained
    }
    return tensors
