"""Replay buffers side by side: samples per second and memory per transition, in one run.

    pip install -e '.[dev]' torchrl
    python benchmarks/replay.py            # about 5 minutes, up to 6 GB of disk under --folder
    python benchmarks/replay.py --quick    # a tenth of the transitions

Ours (cached; through the memory map with a cache of a tenth), stable-baselines3's ReplayBuffer and,
where it is installed, torchrl's (in memory; memory-mapped). State transitions have 42 numbers and 4
actions, image transitions 128x128x3 uint8; episodes of 50 steps. All return float observations and
next observations as they are stored (uint8 for images), on the CPU. The buffers take turns, a round
each, so that what else the machine does hits all alike; medians over rounds, spread in brackets.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

EPISODE, STATE, ACTION, IMAGE = 50, 42, 4, (128, 128, 3)


def episode(kind: str, seed: int) -> dict[str, np.ndarray]:
    """T + 1 rows of observations and T of the rest."""
    rng = np.random.default_rng(seed)
    if kind == "state":
        obs = rng.standard_normal((EPISODE + 1, STATE), np.float32)
    else:
        obs = rng.integers(0, 255, (EPISODE + 1, *IMAGE), np.uint8)
    action = rng.uniform(-1, 1, (EPISODE, ACTION)).astype(np.float32)
    return {"obs": obs, "action": action, "reward": action[:, 0].copy()}


class Ours:
    """`cache` is the share of the transitions that memory holds; 1 for all."""

    def __init__(self, kind: str, size: int, folder: Path, cache: float) -> None:
        from embodied_rl.config import AlgorithmConfig, ReplayBufferConfig
        from embodied_rl.replay.buffer import TrajectoryReplay
        from embodied_rl.replay.store import TrajectoryStore
        from embodied_rl.types import Features

        count = size // EPISODE
        settings = ReplayBufferConfig(
            cache_size=max(1, int(count * cache)),
            cache_bytes=None,
            sample_window_size=count,
            min_buffer_size=1,
            segment_size=256,
            prefetch=0 if cache == 1 else 2,
        )
        self.store = TrajectoryStore(folder, 256, {})
        key = "state" if kind == "state" else "rgb"
        none = torch.zeros(1, 1, 1)
        self.replay = TrajectoryReplay(
            self.store,
            AlgorithmConfig(replay_buffer=settings),
            lambda obs: Features(obs[key], none),
            torch.device("cpu"),
            seed=0,
        )
        self.key = key

    def add(self, rows: dict[str, np.ndarray]) -> None:
        from embodied_rl.types import Trajectory

        def padded(value: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.concatenate([value, np.zeros_like(value[:1])]))

        flags = torch.zeros(EPISODE + 1, dtype=torch.bool)
        self.replay.add(
            Trajectory(
                {
                    f"obs.{self.key}": torch.from_numpy(rows["obs"]),
                    "action": padded(rows["action"])[:, None],
                    "reward": padded(rows["reward"])[:, None],
                    "steps": torch.ones(EPISODE + 1, dtype=torch.int64),
                    "terminated": flags,
                    "truncated": flags,
                    "success": flags,
                }
            )
        )

    def sample(self, n: int) -> Any:
        return self.replay.sample(n)


class StableBaselines:
    def __init__(self, kind: str, size: int, folder: Path) -> None:
        from gymnasium.spaces import Box
        from stable_baselines3.common.buffers import ReplayBuffer

        shape = (STATE,) if kind == "state" else IMAGE
        dtype: Any = np.float32 if kind == "state" else np.uint8
        low, high = (-np.inf, np.inf) if kind == "state" else (0, 255)
        space = Box(low, high, shape, dtype)
        self.buffer = ReplayBuffer(size, space, Box(-1, 1, (ACTION,)), device="cpu", n_envs=1)

    def add(self, rows: dict[str, np.ndarray]) -> None:
        obs, action, reward = rows["obs"], rows["action"], rows["reward"]
        for t in range(EPISODE):
            done = np.array([t == EPISODE - 1])
            info = [{"TimeLimit.truncated": bool(done[0])}]
            self.buffer.add(obs[t], obs[t + 1], action[t], reward[t : t + 1], done, info)

    def sample(self, n: int) -> Any:
        return self.buffer.sample(n)


class TorchRL:
    def __init__(self, kind: str, size: int, folder: Path, *, mapped: bool) -> None:
        from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer

        storage = LazyMemmapStorage(size, scratch_dir=folder) if mapped else LazyTensorStorage(size)
        self.buffer = TensorDictReplayBuffer(storage=storage, batch_size=None)

    def add(self, rows: dict[str, np.ndarray]) -> None:
        from tensordict import TensorDict

        flags = torch.zeros(EPISODE, dtype=torch.bool)
        obs = torch.from_numpy(rows["obs"])
        self.buffer.extend(
            TensorDict(
                {
                    "obs": obs[:-1],
                    "action": torch.from_numpy(rows["action"]),
                    "next": {
                        "obs": obs[1:],
                        "reward": torch.from_numpy(rows["reward"])[:, None],
                        "terminated": flags[:, None],
                    },
                },
                batch_size=[EPISODE],
            )
        )

    def sample(self, n: int) -> Any:
        return self.buffer.sample(n)


def buffers(folder: Path) -> dict[str, Callable[[str, int], Any]]:
    """Name to maker, in the order of the table."""
    made: dict[str, Callable[[str, int], Any]] = {
        "ours, cached": lambda k, n: Ours(k, n, folder / f"ours-{k}-{n}", 1),
        "ours, memory map, cache 1/10": lambda k, n: Ours(k, n, folder / f"map-{k}-{n}", 0.1),
        "stable-baselines3": lambda k, n: StableBaselines(k, n, folder),
    }
    if importlib.util.find_spec("torchrl") is not None:
        made["torchrl, in memory"] = lambda k, n: TorchRL(k, n, folder, mapped=False)
        made["torchrl, memory map"] = lambda k, n: TorchRL(
            k, n, folder / f"torchrl-{k}-{n}", mapped=True
        )
    return made


def resident() -> int:
    """Anonymous bytes of this process: memory maps of files are the system's to drop."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def serve(name: str, kind: str, size: int, folder: Path, pipe: Any) -> None:
    """A process with one buffer, so that memory is its own: fills it, then samples on demand."""
    torch.set_num_threads(1)
    buffer = buffers(folder)[name](kind, 2 * EPISODE)  # imports, before memory is read
    del buffer
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    gc.collect()
    before = resident()
    buffer = buffers(folder)[name](kind, size)
    started = time.perf_counter()
    for number in range(size // EPISODE):
        buffer.add(episode(kind, number))
    added = time.perf_counter() - started
    for _ in range(3):
        buffer.sample(256)
    gc.collect()
    pipe.send((added, (resident() - before) / size))
    while True:
        n, seconds = pipe.recv()
        if n == 0:
            os._exit(0)
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            buffer.sample(n)
            count += 1
        pipe.send(count / (time.perf_counter() - started))


def compare(kind: str, size: int, batches: list[int], rounds: int, folder: Path) -> list[dict]:
    """Measures every buffer of one kind."""
    context = multiprocessing.get_context("spawn")
    served = {}
    for number, name in enumerate(buffers(folder)):
        ours, theirs = context.Pipe()
        arguments = (name, kind, size, folder / str(number), theirs)
        process = context.Process(target=serve, args=arguments, daemon=True)
        process.start()
        served[name] = (ours, *ours.recv())
        print(f"  filled {name} in {served[name][1]:.1f} s", flush=True)
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for batch in batches:
            for name, (pipe, *_) in served.items():
                pipe.send((batch, 1.0))
                rates.setdefault((name, batch), []).append(pipe.recv())
    rows = []
    for name, (pipe, added, memory) in served.items():
        pipe.send((0, 0))
        for batch in batches:
            found = rates[name, batch]
            rows.append(
                {
                    "kind": kind,
                    "buffer": name,
                    "transitions": size,
                    "batch": batch,
                    "batches_per_s": statistics.median(found),
                    "lowest": min(found),
                    "highest": max(found),
                    "bytes_per_transition": memory,
                    "seconds_to_fill": added,
                }
            )
    return rows


def show(rows: list[dict]) -> None:
    print(
        f"\n{'':31}{'batch':>6}  {'batches/s':>22}  {'transitions/s':>14}  {'RAM/transition':>14}"
    )
    for row in rows:
        spread = f"{row['batches_per_s']:9.0f} [{row['lowest']:.0f}, {row['highest']:.0f}]"
        print(
            f"{row['kind'] + ': ' + row['buffer']:37}{row['batch']:>6}  {spread:>22}  "
            f"{row['batches_per_s'] * row['batch']:14,.0f}  {row['bytes_per_transition']:12,.0f} B"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/replay-benchmark"))
    parser.add_argument("--quick", action="store_true", help="a tenth of the transitions")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    share = 10 if args.quick else 1
    shutil.rmtree(args.folder, ignore_errors=True)
    try:
        rows = compare("state", 200_000 // share, [256, 4096], args.rounds, args.folder)
        shutil.rmtree(args.folder, ignore_errors=True)
        rows += compare("image", 20_000 // share, [256, 4096], args.rounds, args.folder)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    show(rows)
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
