"""A large replay store: a million state, a hundred thousand image transitions, and a budget.

    python benchmarks/replay_scale.py                 # a few minutes, 6 GB of disk under --folder
    python benchmarks/replay_scale.py --share 0.1     # a tenth of it

Prints, for each kind: seconds and disk of writing, seconds to reopen (index and headers; no cache),
batches of 256 per second through the memory map, seconds to verify every checksum, and then, with a
disk budget of a fifth and a cache of a tenth, memory and disk at ten moments of further adds: both
should be flat.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import time
from pathlib import Path

import torch
from replay import EPISODE, Ours, episode, resident

from embodied_rl.config import AlgorithmConfig, ReplayBufferConfig
from embodied_rl.replay.buffer import TrajectoryReplay
from embodied_rl.replay.reader import StoreReader
from embodied_rl.replay.store import TrajectoryStore
from embodied_rl.types import Features

ADDS = 5  # further adds, in multiples of the budgeted store


def timed(what: str, started: float) -> None:
    print(f"  {what:<46}{time.perf_counter() - started:8.2f} s", flush=True)


def disk(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir())


def sampler(kind: str, store: StoreReader, settings: ReplayBufferConfig) -> TrajectoryReplay:
    key = "state" if kind == "state" else "rgb"
    return TrajectoryReplay(
        store,
        AlgorithmConfig(replay_buffer=settings),
        lambda obs: Features(obs[key], torch.zeros(1, 1, 1)),
        torch.device("cpu"),
        seed=0,
    )


def large(kind: str, size: int, folder: Path) -> None:
    """Writes, reopens, samples, verifies."""
    store = Ours(kind, size, folder, cache=0.01)
    started = time.perf_counter()
    for number in range(size // EPISODE):
        store.add(episode(kind, number % 100))
    store.store.close()
    timed(f"write {size:,} transitions", started)
    print(
        f"  {'on disk':<46}{disk(folder) / 2**20:8.0f} MiB in {len(list(folder.iterdir()))} files"
    )
    started = time.perf_counter()
    reader = StoreReader(folder)
    timed("reopen", started)
    assert int(reader.lengths.sum()) == size and not reader.problems
    settings = ReplayBufferConfig(
        enable_cache=False, sample_window_size=size, min_buffer_size=1, prefetch=2
    )
    replay = sampler(kind, reader, settings)
    for what in ("first 20 batches of 256 (checksums included)", "20 more"):
        started = time.perf_counter()
        for _ in range(20):
            replay.sample(256)
        timed(what, started)
    started = time.perf_counter()
    assert reader.verify() == []
    timed("verify every checksum", started)


def budgeted(kind: str, size: int, folder: Path) -> None:
    """Adds far beyond the budget, sampling on the way."""
    one = folder / "one"
    probe = Ours(kind, 10 * EPISODE, one, cache=1)
    for number in range(10):
        probe.add(episode(kind, number))
    probe.store.close()
    budget = disk(one) * size // (10 * EPISODE)
    settings = ReplayBufferConfig(
        cache_size=size // EPISODE // 2, sample_window_size=size, min_buffer_size=1
    )
    store = TrajectoryStore(folder / "store", 64, {}, max_bytes=budget)
    adder = Ours.__new__(Ours)
    adder.key = "state" if kind == "state" else "rgb"
    adder.store, adder.replay = store, sampler(kind, store, settings)
    total = ADDS * size // EPISODE
    print(f"  budget {budget / 2**20:.0f} MiB; transitions added, memory, disk:")
    for number in range(total):
        adder.add(episode(kind, number % 100))
        if number % 20 == 0:
            adder.sample(64)
        if (number + 1) % (total // 10) == 0:
            gc.collect()
            print(
                f"    {(number + 1) * EPISODE:>10,}  {resident() / 2**20:7.0f} MiB  "
                f"{disk(folder / 'store') / 2**20:7.0f} MiB",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/replay-scale"))
    parser.add_argument("--share", type=float, default=1.0, help="of the transitions")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for kind, size in (("state", 1_000_000), ("image", 100_000)):
        count = int(size * args.share) // EPISODE * EPISODE
        print(kind, flush=True)
        for step, share in ((large, 1.0), (budgeted, 0.2)):
            shutil.rmtree(args.folder, ignore_errors=True)
            args.folder.mkdir(parents=True)
            try:
                step(kind, int(count * share), args.folder)
            finally:
                shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
