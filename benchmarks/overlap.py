"""Collecting in a process of its own against collecting between updates: A B A B on this machine.

    python benchmarks/overlap.py                     # both cases, some minutes each
    python benchmarks/overlap.py --cases vla --rounds 3 --ahead 2
    python benchmarks/overlap.py --cases state --words algorithm.update_epoch=64

Each run is a whole `embodied_rl.train` with processes of its own, one after another. A collects
between updates, B has `rollout.asynchronous=true`. Rates are those that a run records itself
(evaluations left out), after a share of its steps for compiling and filling; a round's ratio is B's
rate over A's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from embodied_rl.metrics import read_records

ROOT = Path(__file__).resolve().parent.parent
# case -> words, environment steps, environment steps per record
CASES: dict[str, tuple[list[str], int, int]] = {
    # the default task; updates begin with the second episode, the actor's too
    "state": ([], 6_400, 320),
    "vla": (
        [
            f"config={ROOT / 'configs' / 'pushpull.yaml'}",
            f"config={ROOT / 'examples' / 'finetune_small_vla.yaml'}",
        ],
        1_600,
        96,
    ),
}
SAME = (
    "train.compile=always",  # as in runs of full length
    "train.diagnostics=false",
    "algorithm.critic_warmup_steps=0",
    "eval.interval=0",
    "eval.episodes=2",
    "eval.num_envs=1",
    "eval.video=false",
)
MODES = {"A": ("rollout.asynchronous=false",), "B": ("rollout.asynchronous=true",)}
COLUMNS = ("staleness", "staleness_max", "learner_waits", "collector_waits")


def measure(case: str, mode: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """One run; its rates per second and what it says about waiting."""
    words, steps, interval = CASES[case]
    shutil.rmtree(folder, ignore_errors=True)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "embodied_rl.train", *words, *SAME, *MODES[mode]),
            *([f"rollout.ahead={args.ahead}"] if mode == "B" else []),
            f"train.total_steps={args.steps or steps}",
            f"train.log_interval={interval}",
            *args.words,
            f"run_dir={folder}",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if run.returncode != 0:
        raise RuntimeError(run.stderr[-3000:])
    records = [r for r in read_records(folder / "metrics.jsonl") if "speed/steps_per_s" in r]
    kept = [r for r in records if r["step"] > args.skip * (args.steps or steps)]
    found = {
        name: statistics.harmonic_mean([r[f"speed/{name}"] for r in kept])
        for name in ("steps_per_s", "updates_per_s")
    }
    for name in COLUMNS:
        values = [r[f"speed/{name}"] for r in kept if f"speed/{name}" in r]
        if values:
            found[name] = max(values) if name.endswith("max") else statistics.mean(values)
    return found


def spread(values: list[float], form: str = ".1f") -> str:
    """Median and range."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def rows(case: str, runs: dict[str, list[dict[str, float]]]) -> list[str]:
    """Lines of the table."""
    lines = []
    ratios = [b["steps_per_s"] / a["steps_per_s"] for a, b in zip(*runs.values(), strict=True)]
    for mode, name in (("A", "synchronous"), ("B", "asynchronous")):
        found = runs[mode]
        cells = [spread([r[key] for r in found]) for key in ("steps_per_s", "updates_per_s")]
        cells.append(spread(ratios, ".2f") if mode == "B" else "1")
        for key in COLUMNS:
            values = [r[key] for r in found if key in r]
            share = key.endswith("waits")
            cells.append(f"{statistics.mean(values):{'.0%' if share else '.1f'}}" if values else "")
        lines.append(f"| {case} | {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measures the cases by turns; prints the table and writes all figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="environment steps of a run")
    parser.add_argument("--skip", type=float, default=0.4, help="share of them not counted")
    parser.add_argument("--ahead", type=int, default=1)
    parser.add_argument("--words", nargs="*", default=[], help="config overrides for both")
    parser.add_argument("--out", type=Path, default=Path("runs/overlap"))
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        "| case | collecting | steps/s | updates/s | ratio | staleness, updates | largest | "
        "learner waits | collector waits |",
        f"|{'---|' * 9}",
    ]
    everything: dict[str, Any] = {}
    for case in args.cases:
        runs: dict[str, list[dict[str, float]]] = {"A": [], "B": []}
        for number in range(args.rounds):
            for mode, found in runs.items():
                found.append(measure(case, mode, out / f"{case}_{mode}_{number}", args))
                rate = found[-1]["steps_per_s"]
                load = os.getloadavg()[0]
                print(f"{case} {mode} {rate:.1f} steps/s (load {load:.1f})", file=sys.stderr)
        everything[case] = runs
        lines += rows(case, runs)
    (out / "overlap.json").write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
