"""CrossQ and SAC from scratch beside stable-baselines3, sb3-contrib and sbx, settings alike.

    python benchmarks/references.py --task Pendulum-v1 --steps 20000 --out runs/pendulum
    python benchmarks/references.py --task Hopper-v5 --steps 100000 --out runs/hopper

Every implementation gets the same networks, learning rates, batch, discount, random start, policy
delay and number of environment steps, and is scored alike: mean return of the deterministic policy
over `--episodes` episodes from seeds 0, 1, ... at every `--interval` steps. Ours runs as a user
runs it (`python -m embodied_rl.train`), without weight averaging, which the others do not have,
and is resumed where it was cut off; a peer's unfinished run starts anew. Runs are named
<out>/<implementation>_<algo>_s<seed>. A finished one leaves its curve in <curves>/<name>.json
(default <out>/curves) and is left alone, so the command can be repeated until all are done. The
curves of docs/benchmarks.md are committed; `--curves benchmarks/curves/Hopper-v5` draws them.

Prints the interquartile mean over seeds of the score (mean of the last fifth of the evaluations),
its range, and the minutes of the whole run, evaluations included; draws all curves into
<curves>/curves.png. The minutes are no speed benchmark: ours steps the environment in a process of
its own, evaluates twice more at the end and writes checkpoints. Every library has one thread.
Learning starts after 1,000 random steps, in ours after 20 trajectories: earlier where episodes are
short. `--implementations ours ours-bfloat16` compares critics whose products are in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ALGOS = {"crossq": 3, "sac": 1}  # policy delay
IMPLEMENTATIONS = ("ours", "sb3", "sbx", "ours-bfloat16")
OURS, ON_DEMAND = {"ours", "ours-bfloat16"}, {"ours-bfloat16"}
RANDOM, BATCH, RATE, GAMMA, TAU, ACTOR = 1_000, 256, 1e-3, 0.99, 0.005, 256


def ours(args: argparse.Namespace, library: str, algo: str, seed: int) -> None:
    """Runs or resumes our trainer; `library` says in which precision of the critics' products."""
    folder = args.out / name(library, algo, seed)
    words = [f"resume={folder}"]
    if not (folder / "checkpoints" / "last").exists():
        shutil.rmtree(folder, ignore_errors=True)  # cut off before its first checkpoint
        words = [
            f"run_dir={folder}",
            f"seed={seed}",
            "env.type=gymnasium",
            f"env.task={args.task}",
            "env.num_envs=1",
            "policy.path=null",
            f"algorithm.q_head_type={'crossq' if algo == 'crossq' else 'default'}",
            "algorithm.update_epoch=1",
            f"algorithm.batch_size={BATCH}",
            f"algorithm.gamma={GAMMA}",
            f"algorithm.tau={TAU}",
            f"algorithm.policy_delay={ALGOS[algo]}",
            "algorithm.critic_warmup_steps=0",
            "algorithm.anchor.weight=0",
            "algorithm.demo.fraction=0",
            "algorithm.entropy_tuning.alpha_type=exp",
            "algorithm.entropy_tuning.objective=log_alpha",
            "algorithm.entropy_tuning.initial_alpha=1",
            f"algorithm.entropy_tuning.optim.lr={RATE}",
            "algorithm.entropy_tuning.optim.clip_grad=null",
            f"algorithm.replay_buffer.min_buffer_size={RANDOM // 50}",
            "algorithm.replay_buffer.cache_size=40000",
            "algorithm.replay_buffer.sample_window_size=40000",
            f"actor.hidden=[{ACTOR},{ACTOR}]",
            "actor.initial_std=1",
            "actor.average_decay=0",
            f"actor.batch_renorm={'true' if algo == 'crossq' else 'false'}",
            f"actor.optim.lr={RATE}",
            f"critic.hidden=[{args.width},{args.width}]",
            "critic.batch_renorm.warmup_steps=100000",
            f"critic.optim.lr={RATE}",
            "rollout.steps=1",
            f"rollout.random_steps={RANDOM}",
            "rollout.max_trajectory_steps=50",
            f"eval.interval={args.interval}",
            f"eval.episodes={args.episodes}",
            "eval.num_envs=1",
            "eval.metric=return",
            "eval.video=false",
            f"train.total_steps={args.steps}",
            f"train.checkpoint_interval={args.interval}",
        ]
        if library == "ours-bfloat16":
            words.append("critic.matmul_dtype=bfloat16")
        if algo == "crossq":
            words += ["actor.optim.betas=[0.5,0.999]", "critic.optim.betas=[0.5,0.999]"]
    subprocess.run([sys.executable, "-m", "embodied_rl.train", *words], check=True)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [r for r in map(json.loads, lines) if "eval/return" in r]
    seconds = json.loads((folder / "results.json").read_text(encoding="utf-8"))["seconds"]
    curve = [[r["step"], r["eval/return"]] for r in records]
    finish(args.curves, folder.name, curve, seconds)


def peer(args: argparse.Namespace, library: str, algo: str, seed: int) -> None:
    """Trains stable-baselines3's SAC, sb3-contrib's CrossQ, or sbx's."""
    import gymnasium as gym
    import torch

    torch.set_num_threads(1)
    model = build(library, algo, args, seed)
    test = gym.make(args.task)

    def score() -> float:
        returns = []
        for episode in range(args.episodes):
            obs, _ = test.reset(seed=episode)
            total, over = 0.0, False
            while not over:
                action, _ = model.predict(obs, deterministic=True)
                obs, reward, terminated, truncated, _ = test.step(action)
                total, over = total + float(reward), terminated or truncated
            returns.append(total)
        return float(np.mean(returns))

    started = time.monotonic()
    curve = [[0, score()]]
    while model.num_timesteps < args.steps:
        part = min(args.interval, args.steps - model.num_timesteps)
        model.learn(part, reset_num_timesteps=False)
        curve.append([int(model.num_timesteps), score()])
        print(f"{name(library, algo, seed)} {curve[-1][0]:>7,}: {curve[-1][1]:.1f}", flush=True)
    finish(args.curves, name(library, algo, seed), curve, time.monotonic() - started)


def build(library: str, algo: str, args: argparse.Namespace, seed: int) -> Any:
    """Builds a peer's model; its own defaults hold for what is not given here."""
    import sb3_contrib
    import sbx
    import stable_baselines3

    width = [args.width, args.width]
    settings: dict[str, Any] = {
        "learning_rate": RATE,
        "learning_starts": RANDOM,
        "batch_size": BATCH,
        "gamma": GAMMA,
        "ent_coef": "auto_1.0",
        "policy_kwargs": {"net_arch": {"pi": [ACTOR, ACTOR], "qf": width}},
        "seed": seed,
    }
    if library == "sbx":
        settings["qf_learning_rate"] = RATE
    if algo == "crossq":
        kind = {"sb3": sb3_contrib.CrossQ, "sbx": sbx.CrossQ}[library]
        settings["policy_delay"] = ALGOS[algo]
    else:
        kind = {"sb3": stable_baselines3.SAC, "sbx": sbx.SAC}[library]
        settings["tau"] = TAU
    return kind("MlpPolicy", args.task, **settings)


def name(library: str, algo: str, seed: int) -> str:
    """What a run and its curve are called."""
    return f"{library}_{algo}_s{seed}"


def finish(curves: Path, run: str, curve: list[list[float]], seconds: float) -> None:
    """Writes a run's curve; one that has it is finished."""
    curve = [[step, round(score, 3)] for step, score in curve]
    text = json.dumps({"seconds": round(seconds), "curve": curve})
    (curves / f"{run}.json").write_text(text + "\n", encoding="utf-8")


def interquartile_mean(values: list[float]) -> float:
    """Mean of the middle half, with fractional weights at its ends (Agarwal et al. 2021)."""
    ordered, n = np.sort(values), len(values)
    edges = np.arange(n + 1) / n
    weights = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0, None)
    return float((weights * ordered).sum() / weights.sum())


def report(args: argparse.Namespace) -> None:
    """Prints the table and draws the picture of all finished runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(args.algos), squeeze=False, figsize=(6 * len(args.algos), 4))
    print(f"| {args.task} | seeds | IQM of the end | range | minutes |\n|---|---|---|---|---|")
    for axis, algo in zip(axes[0], args.algos, strict=True):
        for color, library in zip(("C3", "C0", "C2", "C1"), IMPLEMENTATIONS, strict=True):
            runs = [args.curves / f"{name(library, algo, seed)}.json" for seed in args.seeds]
            done = [json.loads(r.read_text(encoding="utf-8")) for r in runs if r.exists()]
            if not done:
                continue
            last = []
            for run in done:
                steps, scores = zip(*run["curve"], strict=True)
                axis.plot(steps, scores, c=color, alpha=0.25, lw=1)
                last.append(float(np.mean(scores[-max(1, len(scores) // 5) :])))
            length = min(len(run["curve"]) for run in done)
            every = np.array([[s for _, s in run["curve"][:length]] for run in done])
            middle = [interquartile_mean(list(column)) for column in every.T]
            steps = [step for step, _ in done[0]["curve"][:length]]
            axis.plot(steps, middle, c=color, label=f"{library} ({len(done)})")
            minutes = np.median([run["seconds"] for run in done]) / 60
            print(
                f"| {library} {algo} | {len(done)} | {interquartile_mean(last):.1f} | "
                f"{min(last):.1f} ... {max(last):.1f} | {minutes:.1f} |"
            )
        axis.set(title=f"{args.task}, {algo}", xlabel="environment steps", ylabel="return")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.tight_layout()
    figure.savefig(args.curves / "curves.png", dpi=110)


def check_settings(args: argparse.Namespace) -> None:
    """Refuses to add curves to a folder that was made with other settings."""
    path = args.curves / "settings.json"
    keys = ("task", "steps", "width", "interval", "episodes")
    settings = {key: getattr(args, key) for key in keys}
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
        sys.exit(f"{path} holds other settings than {settings}. Choose another --curves.")
    args.curves.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="Pendulum-v1", help="a gymnasium task with Box spaces")
    parser.add_argument("--steps", type=int, default=20_000, help="environment steps of each run")
    parser.add_argument("--algos", nargs="+", choices=ALGOS, default=list(ALGOS))
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=IMPLEMENTATIONS,
        default=[i for i in IMPLEMENTATIONS if i not in ON_DEMAND],
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=256, help="of the critics' two hidden layers")
    parser.add_argument("--interval", type=int, default=1_000, help="steps between evaluations")
    parser.add_argument("--episodes", type=int, default=10, help="of each evaluation")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--curves", type=Path, help="of finished runs' curves (<out>/curves)")
    parser.add_argument(
        "--one", nargs=3, metavar=("LIBRARY", "ALGO", "SEED"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    args.curves = args.curves or args.out / "curves"
    return args


def main() -> None:
    """Runs what is missing, then reports."""
    args = parse()
    if args.one:  # a peer's run, in a process of its own
        library, algo, seed = args.one
        peer(args, library, algo, int(seed))
        return
    check_settings(args)
    for seed in args.seeds:
        for algo in args.algos:
            for library in args.implementations:
                if (args.curves / f"{name(library, algo, seed)}.json").exists():
                    continue
                if library in OURS:
                    ours(args, library, algo, seed)
                else:
                    words = [*sys.argv, "--one", library, algo, str(seed)]
                    one = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
                    env = {**os.environ, "XLA_FLAGS": one, "OMP_NUM_THREADS": "1"}
                    subprocess.run([sys.executable, *words], check=True, env=env)
    report(args)


if __name__ == "__main__":
    main()
