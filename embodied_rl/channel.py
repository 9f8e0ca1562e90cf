"""Messages between two processes of a run: nested dictionaries of tensors and JSON values."""

from __future__ import annotations

import json
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from embodied_rl.checkpoint import join_tensors, split_tensors

HANDLE = "handle"  # key of a file descriptor in a received message


class Channel:
    """One end of a pipe; a message travels as JSON and, beside it, safetensors.

    Args:
        pipe: of a duplex pair.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def send(self, message: dict[str, Any], handle: int | None = None) -> None:
        """Sends a message, and a file descriptor with it.

        Raises:
            OSError: the other end is gone.
        """
        tensors: dict[str, Tensor] = {}
        tree = split_tensors(message, "", tensors)
        envelope = {"tree": tree, "tensors": bool(tensors), HANDLE: handle is not None}
        self._pipe.send_bytes(json.dumps(envelope).encode())
        if tensors:
            self._pipe.send_bytes(save(tensors))
        if handle is not None:
            reduction.send_handle(self._pipe, handle, None)

    def receive(self) -> dict[str, Any]:
        """Waits for a message; a file descriptor that came with it is its entry `handle`.

        Raises:
            EOFError: the other end is gone.
            OSError: it went in the middle of a message.
        """
        envelope = json.loads(self._pipe.recv_bytes())
        tensors = load(self._pipe.recv_bytes()) if envelope["tensors"] else {}
        message = join_tensors(envelope["tree"], tensors)
        if envelope[HANDLE]:
            message[HANDLE] = reduction.recv_handle(self._pipe)
        return message

    def close(self) -> None:
        """Ends the conversation."""
        self._pipe.close()
