"""Finetunes the shipped policy with each Q head over several seeds, one run after the other.

    python benchmarks/heads.py --heads crossq default --seeds 0 1 2 --out runs/heads

Runs are named <out>/<head>_s<seed>. One that was cut off is resumed, one that is finished is
left alone, so the command can be repeated until all are done. Extra `key=value` words go to every
run. Prints one markdown row per run; draw them with benchmarks/plot_from_scratch.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path


def finish(folder: Path, head: str, seed: int, extra: list[str]) -> None:
    """Starts or resumes one run and waits for it."""
    if (folder / "results.json").exists():
        return
    words = [f"resume={folder}"]
    if not (folder / "checkpoints" / "last").exists():
        shutil.rmtree(folder, ignore_errors=True)  # cut off before its first checkpoint
        words = [f"run_dir={folder}", f"algorithm.q_head_type={head}", f"seed={seed}"]
    subprocess.run([sys.executable, "-m", "embodied_rl.train", *words, *extra], check=True)


def row(folder: Path) -> str:
    """One line of the results table."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    curve = [100 * r["eval/success_once"] for r in records if "eval/success_once" in r]
    before, after = (100 * results[k]["success_once"] for k in ("pretrained", "final"))
    return (
        f"| {folder.name} | {' '.join(f'{v:.0f}' for v in curve)} | {min(curve) - curve[0]:+.0f} | "
        f"{before:.0f} -> {after:.0f} | {100 * results['final']['success_at_end']:.0f} | "
        f"{results['env_steps']:,} | {results['seconds'] / 60:.1f} |"
    )


def main() -> None:
    """Runs what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--heads", nargs="+", default=["crossq", "default"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/heads"))
    parser.add_argument("extra", nargs="*", help="config overrides for every run")
    args = parser.parse_args()
    folders = [(args.out / f"{h}_s{s}", h, s) for s in args.seeds for h in args.heads]
    for folder, head, seed in folders:
        finish(folder, head, seed, args.extra)
    print("| run | evaluations, % | worst dip | held out, % | at end, % | env steps | minutes |")
    print("|---|---|---|---|---|---|---|")
    for folder, _, _ in folders:
        print(row(folder))


if __name__ == "__main__":
    main()
