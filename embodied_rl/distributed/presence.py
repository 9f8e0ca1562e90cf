"""Which processes have come to the message that this one waits in."""

from __future__ import annotations

import socket
import time
from datetime import timedelta

from torch.distributed.distributed_c10d import Store

PAUSE = 1.0  # seconds for the others to tell that a message failed
PATIENCE = timedelta(seconds=5)  # for the answer of the process that keeps the list


class Presence:
    """A list of how far each process has come, which survives those that fail.

    All processes pass the same messages in the same order. Each enters the number of one before it
    waits in it; who is behind a process that waits in vain is who it waits for.

    Args:
        store: where the processes met.
        rank: of this process.
        world: how many there are.
    """

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self._store, self._rank, self._world = store, rank, world
        self._number = 0
        store.set(f"host/{rank}", socket.gethostname())
        store.set(f"number/{rank}", "0")

    def enter(self) -> None:
        """Notes that this process comes to the next message."""
        self._number += 1
        self._store.set(f"number/{self._rank}", str(self._number))

    def missing(self) -> list[str]:
        """Rank and machine of each process that a message failed for; empty where none can tell.

        Those that have not come as far; where all have, those that do not tell of a failure too.
        """
        try:
            self._store.set_timeout(PATIENCE)
            self._store.set(f"failed/{self._rank}", "")
            time.sleep(PAUSE)
            ranks = range(self._world)
            found = [r for r in ranks if int(self._store.get(f"number/{r}")) < self._number]
            if not found:
                found = [r for r in ranks if not self._store.check([f"failed/{r}"])]
            return [f"rank {r} on {self._store.get(f'host/{r}').decode()}" for r in found]
        except RuntimeError:  # the list went with the process that kept it
            return []
