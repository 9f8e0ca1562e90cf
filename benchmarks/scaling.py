"""What several processes tell one another in an update, what it costs here, and what it would cost.

    python benchmarks/scaling.py --out runs/scaling           # 2 and 4 gloo processes, 3 minutes
    python benchmarks/scaling.py --out runs/scaling --worlds  # only the paper part

**Measured**: W processes take CrossQ's update on their share of the batch (`ddp`), as in a run.
Beside it, by turns: the same updates without messages (every process as if it were alone), and the
same messages (number, kind, sizes) without updates. If messages are all that several processes add,
the first is the sum of the other two: `of the sum` is their ratio, the check of the paper part.

**On paper**: seconds of an update without messages, from `embodied_rl.plan` (eager kernels, data
sheets), plus those of the messages on networks that the user names by latency and bandwidth.
Rings: a gather or a sum of n bytes over W takes (W - 1) hops of latency once, or twice for a sum,
and moves n (W - 1), or 2 n (W - 1) / W bytes through the slowest link. Every GPU keeps its rows
(weak scaling): the batch grows with W. Efficiency is time on one GPU / time on W.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from embodied_rl.batch_renorm import BatchRenorm
from embodied_rl.builders import build_policy, build_q_head, build_sac
from embodied_rl.config import Config
from embodied_rl.costs.devices import KNOWN
from embodied_rl.costs.estimate import Estimate, estimate
from embodied_rl.costs.outlook import outlook
from embodied_rl.distributed import Ranks
from embodied_rl.interfaces.sketch import Assumed
from embodied_rl.load_config import load_config
from embodied_rl.sac import SAC
from embodied_rl.types import ArraySpec, Batch, EnvSpec, Features

CPU = torch.device("cpu")
STATE, ACTION = 42, 4  # PickCube's
SETTINGS = [
    "policy.path=null",
    "env.num_envs=8",
    "eval.num_envs=8",
    "algorithm.q_head_type=crossq",
    "algorithm.critic_warmup_steps=0",
    "algorithm.demo.fraction=0",
    "train.compile=never",
]


@dataclass(frozen=True)
class Link:
    """What messages go through.

    Attributes:
        name: of the network.
        gpus: that one switch of it joins; more go through `beyond`.
        latency: seconds of a hop.
        bandwidth: bytes/s of each GPU.
    """

    name: str
    gpus: int
    latency: float
    bandwidth: float


# nominal: eight GPUs of a node by NVLink 4, nodes by a 400 Gb/s port for each GPU; beside it nodes
# that share 25 Gb/s Ethernet. Latencies are NCCL's usual ones for small messages, per hop.
NETWORKS = {
    "NVLink, InfiniBand 400G": (
        Link("NVLink", 8, 2e-6, 360e9),
        Link("InfiniBand", 10**6, 5e-6, 45e9),
    ),
    "PCIe, Ethernet 25G": (Link("PCIe", 8, 5e-6, 20e9), Link("Ethernet", 10**6, 30e-6, 0.35e9)),
}
WORLDS = (1, 2, 4, 8, 16, 64, 256, 512)
PI0 = "config=examples/finetune_pi0_maniskill.yaml"
PIECES = ("policy.cache_features=false", "policy.micro_batch=8")
CASES: dict[str, tuple[Any, ...]] = {  # pixels of an image's side, words of the command
    "MLP (default task)": (128, "algorithm.q_head_type=crossq"),
    "small VLA, cached features": (
        128,
        "config=configs/pushpull.yaml",
        "config=examples/finetune_small_vla.yaml",
    ),
    "pi0, cached features": (224, PI0),
    "pi0, LoRA": (224, PI0, *PIECES, "policy.trainable=lora"),
    "pi0, all weights": (224, PI0, *PIECES, "policy.trainable=full", "policy.dtype=float32"),
}
Message = tuple[str, int]  # kind (gather, sum), numbers of four bytes in each process's part


class Recorder:
    """Notes every message, and sends it on."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._gather, self._sum = dist.all_gather, dist.all_reduce
        dist.all_gather, dist.all_reduce = self.gather, self.sum  # type: ignore[assignment]

    def gather(self, parts: list[torch.Tensor], tensor: torch.Tensor) -> Any:
        self.messages.append(("gather", tensor.numel()))
        return self._gather(parts, tensor)

    def sum(self, tensor: torch.Tensor) -> Any:
        self.messages.append(("sum", tensor.numel()))
        return self._sum(tensor)

    def close(self) -> None:
        dist.all_gather, dist.all_reduce = self._gather, self._sum


def learner(batch: int, width: int) -> tuple[SAC, Batch]:
    """CrossQ's learner and one batch, for the default task's sizes."""
    words = [*SETTINGS, f"algorithm.batch_size={batch}", f"critic.hidden=[{width},{width}]"]
    config, _ = load_config(Config, words)
    torch.manual_seed(0)
    spec = EnvSpec({"state": ArraySpec((STATE,), torch.float32)}, ACTION, 50, "PickCube-v1")
    policy = build_policy(config, spec, CPU)
    sac = build_sac(config, policy, build_q_head(config, policy, CPU), CPU)

    def features() -> Features:
        return Features(torch.randn(batch, STATE), torch.rand(batch, 1, ACTION) - 0.5)

    action = torch.rand(batch, 1, ACTION) - 0.5
    no = torch.zeros(batch, dtype=torch.bool)
    rest = (torch.randn(batch), torch.full((batch,), 0.9), no)
    return sac, Batch(features(), features(), action, *rest)


def timed(work: Any, seconds: float) -> float:
    """Mean seconds of `work`, repeated as often as all processes do in about that time."""
    dist.barrier()
    started = time.perf_counter()
    work()
    dist.barrier()
    count = torch.tensor(max(3, int(seconds / (time.perf_counter() - started))))
    dist.broadcast(count, 0)
    started = time.perf_counter()
    for _ in range(int(count)):
        work()
    dist.barrier()
    return (time.perf_counter() - started) / int(count)


def process(rank: int, world: int, folder: str, args: argparse.Namespace) -> None:
    """One of W; the first writes what it measured."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    together, batch = learner(args.batch // world, args.width)
    whole = Ranks.__init__

    def nobody_else(self: Ranks) -> None:
        self.rank, self.world = 0, 1

    Ranks.__init__ = nobody_else  # type: ignore[method-assign]
    alone, _ = learner(args.batch // world, args.width)
    Ranks.__init__ = whole  # type: ignore[method-assign]

    def delayed(sac: SAC) -> Any:
        def work() -> None:  # as many updates as one of the actor takes
            for _ in range(sac.config.policy_delay):
                sac.update(batch, env_steps=10**9)

        return work

    work = delayed(together)
    for _ in range(3):
        work()
    recorder = Recorder()
    work()
    recorder.close()
    buffers = [(kind, torch.zeros(count)) for kind, count in recorder.messages]
    parts = [[torch.zeros_like(b) for _ in range(world)] for _, b in buffers]

    def messages() -> None:
        for (kind, buffer), places in zip(buffers, parts, strict=True):
            dist.all_gather(places, buffer) if kind == "gather" else dist.all_reduce(buffer)

    delay = together.config.policy_delay
    ways = {"together": work, "alone": delayed(alone), "messages": messages}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            found[name].append(1e3 * timed(way, args.seconds) / delay)
    if rank == 0:
        result = {"world": world, "sent": recorder.messages, "delay": delay, "ms": found}
        (Path(folder) / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    dist.destroy_process_group()


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints one line for each number of processes."""
    print(f"one update, batch {args.batch} in all, critics 2 x [{args.width}, {args.width}], ms")
    print("| processes | messages | KB | update | without messages | messages alone | of the sum |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for world in args.worlds:
        folder = args.out / f"{world}_processes"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rendezvous").unlink(missing_ok=True)
        spawn(process, (world, str(folder), args), nprocs=world, join=True)
        found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        ms, delay = found["ms"], found["delay"]
        parts = zip(ms["together"], ms["alone"], ms["messages"], strict=True)
        ratios = sorted(t / (a + m) for t, a, m in parts)
        together, alone, messages = (median(ms[n]) for n in ("together", "alone", "messages"))
        sent = [4 * n for _, n in found["sent"]]
        print(
            f"| {world} | {len(sent) / delay:.1f} | {sum(sent) / delay / 1e3:.0f} | {together:.2f} "
            f"| {alone:.2f} | {messages:.2f} | {median(ratios):.2f} "
            f"[{ratios[0]:.2f}, {ratios[-1]:.2f}] |",
            flush=True,
        )
        rows.append(found)
    return rows


def planned(words: list[str], pixels: int) -> Estimate:
    """The plan of a run on one GPU."""
    config = load_config(Config, words)[0]
    env = config.env
    told = tuple(env.instructions.values())
    assumed = Assumed(None, None, None, pixels, env.max_episode_steps or 50, env.name, told)
    return estimate(config, assumed, 1)


def sent_by(plan: Estimate) -> list[tuple[Message, float]]:
    """Messages of an update of a planned run, and how often in an update."""
    often = 1 / plan.config.algorithm.policy_delay
    accounts = plan.draft.engine.accounts
    messages: list[tuple[Message, float]] = []
    for module, share in ((plan.draft.q_head, 1.0), (plan.draft.policy.actor, often)):
        assert module is not None
        for layer in module.modules():
            if isinstance(layer, BatchRenorm):
                features = len(layer.weight)
                messages.append((("gather", 1 + 2 * features), share))  # moments, with their rows
                messages.append((("gather", 2 * features), share))  # their gradients
    for name, account in accounts.items():
        share = often if name in ("actor", "temperature") else 1.0
        messages.append((("sum", account.count), share))
    return messages


def seconds(message: Message, world: int, links: tuple[Link, Link]) -> float:
    """Of a ring through the slowest link that `world` GPUs need."""
    kind, numbers = message
    near, far = links
    count = 4 * numbers
    if world <= near.gpus:
        hops = (world - 1) * near.latency
        bandwidth = near.bandwidth
    else:
        nodes = world // near.gpus
        hops = (nodes - 1) * far.latency + (near.gpus - 1) * near.latency
        bandwidth = far.bandwidth
    hops = min(hops, 2 * math.ceil(math.log2(max(world, 2))) * far.latency)  # or trees
    if kind == "gather":
        return hops + count * (world - 1) / bandwidth
    return 2 * hops + 2 * count * (world - 1) / world / bandwidth


def predict(gpu: str) -> None:
    """Prints efficiencies on paper."""
    for network, links in NETWORKS.items():
        print(f"\nefficiency of updates on {gpu}, {network}, as many rows on every GPU")
        print("| case | update, ms | messages | MB | " + " | ".join(map(str, WORLDS)) + " |")
        print("|---" * (4 + len(WORLDS)) + "|")
        for name, (pixels, *words) in CASES.items():
            plan = planned(words, pixels)
            update = outlook(plan, KNOWN[gpu], None).update_eager_s
            messages = sent_by(plan)
            size = sum(4 * n * share for (_, n), share in messages) / 1e6
            cells = []
            for world in WORLDS:
                talk = sum(share * seconds(m, world, links) for m, share in messages)
                cells.append(f"{update / (update + talk * (world > 1)):.0%}")
            count = sum(share for _, share in messages)
            print(
                f"| {name} | {1e3 * update:.1f} | {count:.1f} | {size:.2f} | "
                + " | ".join(cells)
                + " |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", nargs="*", type=int, default=[1, 2, 4], help="processes here")
    parser.add_argument("--batch", type=int, default=256, help="rows of all processes together")
    parser.add_argument("--width", type=int, default=256, help="of the critics' hidden layers")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each of the three")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each turn")
    parser.add_argument("--gpu", choices=KNOWN, default="h100", help="of the paper part")
    parser.add_argument("--out", type=Path, required=True, help="folder of the measurements")
    args = parser.parse_args()
    if any(args.batch % world for world in args.worlds):
        sys.exit(f"--batch {args.batch} cannot be shared by each of {args.worlds} processes.")
    if args.worlds:
        measure(args)
    predict(args.gpu)


if __name__ == "__main__":
    main()
