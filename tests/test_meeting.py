"""Processes of one start find one another in a store that former starts have written in."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from torch.distributed import HashStore, PrefixStore

from embodied_rl.distributed.meeting import meet_in

pytestmark = pytest.mark.unit


def start(store: HashStore, order: list[int]) -> list[PrefixStore]:
    """The parts that processes get which come one after another, first rank first."""
    with ThreadPoolExecutor(len(order)) as pool:
        futures: dict[int, Future] = {}
        for rank in order:
            futures[rank] = pool.submit(meet_in, store, rank, len(order), 10.0)
            time.sleep(0.05)
        return [futures[rank].result() for rank in sorted(order)]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_each_start_has_a_part_of_its_own(order):
    """Also where ranks look before rank 0 has replaced the offer of the former start."""
    store = HashStore()
    for number in range(3):
        parts = start(store, order)
        assert not parts[1].check(["address"]), "nothing of a former start"
        parts[0].set("address", str(number))
        assert [part.get("address") for part in parts] == [str(number).encode()] * 3


@pytest.mark.parametrize("worlds", [(2, 3), (3, 2)], ids=["more", "fewer"])
def test_starts_of_another_number_of_processes(worlds):
    """As when a machine joins or leaves: the former offer, of as many as there were, is there."""
    store = HashStore()
    for world in worlds:
        parts = start(store, list(reversed(range(world))))
        parts[0].set("address", str(world))
        assert [part.get("address") for part in parts] == [str(world).encode()] * world


def test_a_former_offer_alone_does_not_hold():
    """A process whose rank 0 has not restarted yet keeps waiting, and says so in the end."""
    store = HashStore()
    start(store, [0, 1])
    with pytest.raises(RuntimeError, match="not all of them came to rank 0 within train.rank_tim"):
        meet_in(store, 1, 2, 0.2)
    with pytest.raises(RuntimeError, match="rank 1 of 2 did not come within train.rank_timeout"):
        meet_in(store, 0, 2, 0.2)
