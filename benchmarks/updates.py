"""Gradient updates per second beside stable-baselines3, sb3-contrib and sbx, in one run.

    pip install -e '.[dev]'
    python benchmarks/updates.py                    # CrossQ and SAC at width 256, one thread
    python benchmarks/updates.py --widths 256 1024 2048 --batches 256 1024 --threads 1 2

One update is all that training does for one gradient step: a batch from replay, the critic, every
`policy delay` of them the actor and the temperature, the target network where there is one, and
what the trainer records. Everybody gets HalfCheetah's sizes (17 observations, 6 actions), a full
buffer of 100,000 transitions and the same networks. Each implementation runs in a process of its
own, held to as many cores as it has threads; they take turns, a round each, so that what else the
machine does hits all alike. Medians over rounds, quartiles in brackets; the share is that of the
machine's own rate in float32 products [2 batch, width] x [width, width] in the same run.

`ours bf16` takes the products of the critics' hidden layers in bfloat16, all else in float32
(`critic.matmul_dtype=bfloat16`); the others have no such setting.

`sbx` compiles one call of several updates into one program; a run that updates once per environment
step cannot use that, so it takes one per call here. `sbx x8` takes eight.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from turns import Step, Worker, by_turns, serve

OBS, ACT, TRANSITIONS, EPISODE = 17, 6, 100_000, 1_000
ACTOR, RATE, GAMMA = 256, 1e-3, 0.99
DELAY = {"crossq": 3, "sac": 1}


def ours(case: argparse.Namespace) -> Step:
    """Our learner and replay, put together as the trainer does."""
    import torch

    from embodied_rl import builders
    from embodied_rl.config import Config
    from embodied_rl.guard import Guard, Update
    from embodied_rl.load_config import load_config
    from embodied_rl.metrics import Means
    from embodied_rl.types import ArraySpec, EnvSpec, Trajectory

    torch.set_num_threads(case.threads)
    crossq = case.algo == "crossq"
    words = [
        "policy.path=null",
        f"algorithm.q_head_type={'crossq' if crossq else 'default'}",
        f"algorithm.batch_size={case.batch}",
        f"algorithm.policy_delay={DELAY[case.algo]}",
        f"algorithm.gamma={GAMMA}",
        "algorithm.critic_warmup_steps=0",
        "algorithm.anchor.weight=0",
        "algorithm.demo.fraction=0",
        "algorithm.entropy_tuning.optim.clip_grad=null",
        f"actor.hidden=[{ACTOR},{ACTOR}]",
        "actor.average_decay=0",
        f"actor.batch_renorm={str(crossq).lower()}",
        f"critic.hidden=[{case.width},{case.width}]",
        "critic.batch_renorm.warmup_steps=0",
        *case.words,
    ]
    if crossq:
        words += ["actor.optim.betas=[0.5,0.999]", "critic.optim.betas=[0.5,0.999]"]
    config, _ = load_config(Config, words)
    spec = EnvSpec({"state": ArraySpec((OBS,), torch.float32)}, ACT, EPISODE, "sizes")
    device = torch.device("cpu")
    policy = builders.build_policy(config, spec, device)
    sac = builders.build_sac(config, policy, builders.build_q_head(config, policy, device), device)
    folder = tempfile.TemporaryDirectory()
    replay = builders.build_replay(config, policy, Path(folder.name), device, config.seed)
    flags = torch.zeros(EPISODE + 1, dtype=torch.bool)
    for _ in range(TRANSITIONS // EPISODE):
        state = torch.randn(EPISODE + 1, OBS)
        fields = {
            "obs.state": state,
            "action": torch.rand(EPISODE + 1, 1, ACT) * 2 - 1,
            "reward": torch.randn(EPISODE + 1, 1),
            "steps": torch.ones(EPISODE + 1, dtype=torch.int64),
            **{flag: flags for flag in ("terminated", "truncated", "success")},
            **policy.encode({"state": state}).tensors(),
        }
        replay.add(Trajectory(fields))
    means, guard, count = Means(), Guard(Path(folder.name) / "failure", enabled=True), 0

    def step(updates: int) -> None:
        nonlocal count
        for _ in range(updates):
            sac.engine.set_progress(0.5)
            batch = replay.sample(case.batch)
            metrics = sac.update(batch, env_steps=10**6)
            count += 1
            guard.watch(Update(count, count, batch, metrics))
            means.add(metrics)
        guard.verify()
        means.pop()
        assert folder  # lives as long as the replay

    return step


def peer(case: argparse.Namespace, library: str, per_call: int) -> Step:
    """A peer's own `train`, on its own buffer."""
    import gymnasium as gym
    import sb3_contrib
    import sbx
    import stable_baselines3
    import torch
    from gymnasium.spaces import Box
    from stable_baselines3.common.logger import Logger

    torch.set_num_threads(case.threads)

    class Sizes(gym.Env[Any, Any]):
        observation_space = Box(-np.inf, np.inf, (OBS,), np.float32)
        action_space = Box(-1, 1, (ACT,), np.float32)

    settings: dict[str, Any] = {
        "learning_rate": RATE,
        "batch_size": case.batch,
        "gamma": GAMMA,
        "buffer_size": TRANSITIONS,
        "policy_kwargs": {"net_arch": {"pi": [ACTOR, ACTOR], "qf": [case.width, case.width]}},
        "seed": 0,
    }
    kinds: dict[str, Any]
    if case.algo == "crossq":
        kinds = {"sb3": sb3_contrib.CrossQ, "sbx": sbx.CrossQ}
        settings["policy_delay"] = DELAY[case.algo]
    else:
        kinds = {"sb3": stable_baselines3.SAC, "sbx": sbx.SAC}
    model = kinds[library]("MlpPolicy", Sizes(), device="cpu", **settings)
    model.set_logger(Logger(folder=None, output_formats=[]))
    rng, buffer = np.random.default_rng(0), model.replay_buffer
    for name, value in (
        ("observations", rng.standard_normal(buffer.observations.shape)),
        ("next_observations", rng.standard_normal(buffer.observations.shape)),
        ("actions", rng.uniform(-1, 1, buffer.actions.shape)),
        ("rewards", rng.standard_normal(buffer.rewards.shape)),
    ):
        getattr(buffer, name)[:] = value
    buffer.full = True

    def step(updates: int) -> None:
        for _ in range(updates // per_call):
            model.train(gradient_steps=per_call, batch_size=case.batch)
        if library == "sbx":
            import jax

            jax.block_until_ready(model.policy.qf_state.params)

    return step


def product(case: argparse.Namespace) -> Step:
    """The machine's matrix product, for the share."""
    import torch

    torch.set_num_threads(case.threads)
    left, right = torch.randn(2 * case.batch, case.width), torch.randn(case.width, case.width)
    out = torch.empty_like(left)

    def step(times: int) -> None:
        for _ in range(times):
            torch.mm(left, right, out=out)

    return step


def build(case: argparse.Namespace) -> Step:
    """The step function of an implementation."""
    if case.worker == "ours":
        return ours(case)
    if case.worker == "ours bf16":
        case.words = [*case.words, "critic.matmul_dtype=bfloat16"]
        return ours(case)
    if case.worker == "product":
        return product(case)
    library, _, per_call = case.worker.partition(" x")
    return peer(case, library, int(per_call or 1))


def gflop(case: argparse.Namespace) -> float:
    """Of the matrix products in one update; 2 m n k each, without gradients that nobody needs."""
    b, h, critic_in = case.batch, case.width, OBS + ACT
    rows = 2 * b if case.algo == "crossq" else b
    first, rest = critic_in * h, h * h + h
    actor = OBS * ACTOR + ACTOR * ACTOR + 2 * ACT * ACTOR
    total = 2 * (3 * rows * (first + rest) - rows * first)  # both critics: forward, two backward
    if case.algo == "sac":
        total += 2 * b * (first + rest)  # the target network
    total += b * actor  # the next actions
    steps = 3 * b * actor - b * OBS * ACTOR + 2 * 2 * b * (first + rest)  # through both critics
    return 2e-9 * (total + steps / DELAY[case.algo])


def measure(case: argparse.Namespace) -> dict[str, list[float]]:
    """Rates of all implementations in one setting, by turns."""
    names = ["product", "ours", "ours bf16", "sb3", "sbx", "sbx x8"]
    workers = []
    for name in names:
        if name not in case.without:
            command = [sys.executable, __file__, "--worker", name, "--algo", case.algo]
            for key in ("threads", "width", "batch"):
                command += [f"--{key}", str(getattr(case, key))]
            workers.append(Worker(name, [*command, *case.words], case.seconds, quantum=8))
    return by_turns(workers, case.rounds)


def row(case: argparse.Namespace, rates: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, quartiles, ratios to ours, shares of the machine's product rate."""
    flop = 4e-9 * case.batch * case.width**2
    peak = flop * statistics.median(rates["product"])
    entry: dict[str, Any] = {k: getattr(case, k) for k in ("algo", "width", "batch", "threads")}
    entry |= {"peak_gflops": peak, "gflop_per_update": gflop(case), "implementations": {}}
    mine = rates["ours"]
    for name, values in rates.items():
        if name != "product":
            low, middle, high = statistics.quantiles(values, n=4)
            entry["implementations"][name] = {
                "updates_per_s": middle,
                "quartiles": [low, high],
                "share": middle * gflop(case) / peak,
                "ours_over_it": statistics.median(a / b for a, b in zip(mine, values, strict=True)),
            }
    return entry


def table(entries: list[dict[str, Any]]) -> str:
    """Markdown: a row for each setting and implementation."""
    lines = [
        "| algorithm | width | batch | threads | | updates/s | share of product rate | ours / it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for e in entries:
        where = f"| {e['algo']} | {e['width']} | {e['batch']} | {e['threads']} "
        for name, v in e["implementations"].items():
            low, high = v["quartiles"]
            lines.append(
                f"{where}| {name} | {v['updates_per_s']:.1f} [{low:.1f}, {high:.1f}] | "
                f"{v['share']:.0%} | {v['ours_over_it']:.2f} |"
            )
    return "\n".join(lines)


def draw(entries: list[dict[str, Any]], path: Path) -> None:
    """Bars of updates per second relative to sb3-contrib's, a group for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(2 + 1.4 * len(entries), 4))
    names = list(entries[0]["implementations"])
    base_name = "sb3" if "sb3" in names else names[0]
    for i, name in enumerate(names):
        found = [e["implementations"].get(name) for e in entries]
        base = [e["implementations"][base_name]["updates_per_s"] for e in entries]
        heights = [f["updates_per_s"] / b if f else 0 for f, b in zip(found, base, strict=True)]
        places = [x + (i - len(names) / 2) * 0.8 / len(names) for x in range(len(entries))]
        axis.bar(places, heights, 0.8 / len(names), label=name)
    labels = [f"{e['algo']} {e['width']}\nb{e['batch']} t{e['threads']}" for e in entries]
    axis.set_xticks(range(len(entries)), labels)
    axis.set_ylabel(f"updates per second / {base_name}'s")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures every setting, prints the table, writes JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--algos", nargs="+", default=["crossq", "sac"], choices=list(DELAY))
    parser.add_argument("--widths", nargs="+", type=int, default=[256])
    parser.add_argument("--batches", nargs="+", type=int, default=[256])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a round, about")
    parser.add_argument("--without", nargs="*", default=[], help="implementations to leave out")
    parser.add_argument("--out", type=Path, default=Path("runs/updates"))
    parser.add_argument("--words", nargs="*", default=[], help="config overrides for ours")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    entries = []
    for threads in args.threads:
        for algo in args.algos:
            for width in args.widths:
                for batch in args.batches:
                    setting = {"algo": algo, "width": width, "batch": batch, "threads": threads}
                    case = argparse.Namespace(**{**vars(args), **setting})
                    entries.append(row(case, measure(case)))
                    # after every setting: it takes long
                    text = json.dumps(entries, indent=2) + "\n"
                    (args.out / "updates.json").write_text(text, encoding="utf-8")
                    print("\n".join(table(entries[-1:]).splitlines()[2:]), file=sys.stderr)
    draw(entries, args.out / "updates.png")
    print(table(entries))


def worker() -> None:
    """Entry of the processes that `main` starts."""
    parser = argparse.ArgumentParser()
    for name in ("worker", "algo"):
        parser.add_argument(f"--{name}")
    for name in ("threads", "width", "batch"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("words", nargs="*")
    case = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: case.threads])
    serve(lambda: build(case), warm_up=48)


if __name__ == "__main__":
    worker() if "--worker" in sys.argv else main()
