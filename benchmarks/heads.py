"""Finetunes the shipped policy with each Q head over several seeds, one run after the other.

    python benchmarks/heads.py --heads crossq default --seeds 0 1 2 --out runs/heads

Runs are named <out>/<head>_s<seed>, with `--name` before it. One that was cut off is resumed, one
that is finished is left alone, so the command can be repeated until all are done. Extra `key=value`
words go to every run. Prints one markdown row per run.

A finished run's config, results and evaluations are kept in <keep>/<run> (default <out>/kept),
which is small enough to commit; what is there counts as finished. Draw it with
`benchmarks/plot_from_scratch.py <keep>/*`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

RESULTS, METRICS, CONFIG = "results.json", "metrics.jsonl", "config.yaml"


def finish(folder: Path, head: str, seed: int, extra: list[str]) -> None:
    """Starts or resumes one run and waits for it."""
    if (folder / RESULTS).exists():
        return
    words = [f"resume={folder}"]
    if not (folder / "checkpoints" / "last").exists():
        shutil.rmtree(folder, ignore_errors=True)  # cut off before its first checkpoint
        words = [f"run_dir={folder}", f"algorithm.q_head_type={head}", f"seed={seed}"]
    subprocess.run([sys.executable, "-m", "embodied_rl.train", *words, *extra], check=True)


def keep(folder: Path, kept: Path) -> None:
    """Copies what the table and the picture need of a finished run."""
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / CONFIG, kept / CONFIG)
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
    evaluations = [line for line in lines if "eval/return" in json.loads(line)]
    (kept / METRICS).write_text("".join(evaluations), encoding="utf-8")
    shutil.copy(folder / RESULTS, kept / RESULTS)  # last: it says that the rest is there


def row(folder: Path) -> str:
    """One line of the results table."""
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (folder / METRICS).open(encoding="utf-8")]
    curve = [100 * r["eval/success_once"] for r in records if "eval/success_once" in r]
    before, after = (100 * results[k]["success_once"] for k in ("pretrained", "final"))
    return (
        f"| {folder.name} | {' '.join(f'{v:.0f}' for v in curve)} | {min(curve) - curve[0]:+.0f} | "
        f"{before:.0f} -> {after:.0f} | {100 * results['final']['success_at_end']:.0f} | "
        f"{results['env_steps']:,} | {results['seconds'] / 60:.1f} |"
    )


def main() -> None:
    """Runs what is missing, then prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", nargs="+", default=["crossq", "default"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/heads"))
    parser.add_argument("--keep", type=Path, help="where finished runs' curves go (<out>/kept)")
    parser.add_argument("--name", default="", help="what these runs' names begin with")
    parser.add_argument("extra", nargs="*", help="config overrides for every run")
    args = parser.parse_args()
    kept = args.keep or args.out / "kept"
    prefix = f"{args.name}_" if args.name else ""
    done = []
    for seed in args.seeds:
        for head in args.heads:
            run = f"{prefix}{head}_s{seed}"
            if not (kept / run / RESULTS).exists():
                finish(args.out / run, head, seed, args.extra)
                keep(args.out / run, kept / run)
            done.append(kept / run)
    print("| run | evaluations, % | worst dip | held out, % | at end, % | env steps | minutes |")
    print("|---|---|---|---|---|---|---|")
    for folder in done:
        print(row(folder))


if __name__ == "__main__":
    main()
