"""How the processes of one start find one another among the traces of former starts."""

from __future__ import annotations

import json
import time
import uuid

from torch.distributed.distributed_c10d import PrefixStore, Store

FIRST_PAUSE, LONGEST_PAUSE = 0.01, 1.0  # seconds between two looks at the store


def meet_in(store: Store, rank: int, world: int, timeout: float) -> PrefixStore:
    """A part of a store that the processes of this start have to themselves.

    torchrun keeps one store for all its restarts, and the addresses that failed processes left in
    it are taken for those of their successors, which then wait for ever (pytorch/pytorch#135712;
    the number of restarts does not tell them apart: each machine counts its own). So the first
    rank offers a new name, the others answer with names of their own, and the offer holds once
    it repeats those: an offer of a former start can only repeat former names.

    Args:
        store: where torchrun or accelerate lets them meet.
        rank: of this process.
        world: how many there are.
        timeout: seconds to wait for the others.

    Raises:
        RuntimeError: some did not come.
    """
    own = uuid.uuid4().hex
    deadline = time.monotonic() + timeout
    pause = FIRST_PAUSE
    if rank == 0:
        store.set("meeting/offer", own)
        answers = [f"meeting/{own}/{other}" for other in range(1, world)]
        for other, key in enumerate(answers, start=1):
            while not store.check([key]):
                pause = wait(pause, deadline, f"rank {other} of {world} did not come")
        store.set(f"meeting/{own}/held", json.dumps([store.get(k).decode() for k in answers]))
        return PrefixStore(f"start/{own}", store)
    while True:
        if store.check(["meeting/offer"]):
            offer = store.get("meeting/offer").decode()
            store.set(f"meeting/{offer}/{rank}", own)
            held = f"meeting/{offer}/held"
            if store.check([held]) and own in json.loads(store.get(held)):
                return PrefixStore(f"start/{offer}", store)
        pause = wait(pause, deadline, "not all of them came to rank 0")


def wait(pause: float, deadline: float, reason: str) -> float:
    """Sleeps; returns how long to sleep next time.

    Raises:
        RuntimeError: the deadline is past.
    """
    if time.monotonic() > deadline:
        raise RuntimeError(f"{reason} within train.rank_timeout.")
    time.sleep(pause)
    return min(2 * pause, LONGEST_PAUSE)
