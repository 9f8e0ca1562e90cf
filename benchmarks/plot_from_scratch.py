"""One picture and one table of our runs beside sb3-contrib's CrossQ from scratch.

    python benchmarks/plot_from_scratch.py runs/* scratch_s*.jsonl --out docs/learning_curve.png

Takes any number of run folders of `embodied_rl.train` (their `metrics.jsonl` and `config.yaml`, or
what `heads.py` kept of them) and of files of `from_scratch.py`, in any order, finished or not.
Draws the mean over seeds as a thick line, over the steps that all seeds have reached, and every
seed as a thin one; prints a markdown table of each seed's success and their median. Evaluations
fall on the first iteration after each interval (5,024 for 5,000), so steps close to a multiple of
`--interval` are rounded to it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from embodied_rl.metrics import RECORDS, read_records

METRICS = ("success_once", "success_at_end", "return")
COLORS = ("tab:blue", "tab:orange", "tab:grey", "tab:green", "tab:red", "tab:purple")


@dataclass
class Curve:
    """The evaluations of one run.

    Attributes:
        label: what it is a seed of.
        seed: of the run.
        scores: rounded environment step to the metric.
        pretrained: the metric before training, where training began from a pretrained policy.
    """

    label: str
    seed: int
    scores: dict[int, float]
    pretrained: float | None = None


def read_run(folder: Path, metric: str, interval: int) -> Curve:
    """Reads one of our run folders.

    Raises:
        ValueError: it is none, or holds no evaluation.
    """
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} has no config.yaml: expected a run folder")
    config: Any = OmegaConf.load(folder / "config.yaml")
    scores = _scores(read_records(folder / RECORDS), metric, interval, folder)
    pretrained = scores.get(0) if config.policy.path is not None else None
    label = f"ours, {config.actor.type} + {config.algorithm.q_head_type}"
    return Curve(label, int(config.seed), scores, pretrained)


def read_scratch(path: Path, metric: str, interval: int) -> Curve:
    """Reads one file of `from_scratch.py`.

    Raises:
        ValueError: it is none, or holds no evaluation.
    """
    records = read_records(path)
    if not records or "label" not in records[0]:
        raise ValueError(f"{path} does not begin with the settings that from_scratch.py writes")
    width = records[0]["critic_width"]
    label = f"{records[0]['label']}, width {width}"
    return Curve(label, int(records[0]["seed"]), _scores(records, metric, interval, path))


def _scores(
    records: list[dict[str, Any]], metric: str, interval: int, path: Path
) -> dict[int, float]:
    name = f"eval/{metric}"
    scores = {_rounded(r["step"], interval): r[name] for r in records if name in r}
    if not scores:
        raise ValueError(f"{path} holds no evaluation yet")
    return scores


def _rounded(step: int, interval: int) -> int:
    """The multiple of `interval` that `step` is within a tenth of, else `step` itself."""
    nearest = round(step / interval) * interval
    return nearest if abs(step - nearest) <= interval / 10 else step


def read_all(paths: list[Path], metric: str, interval: int) -> dict[str, list[Curve]]:
    """Groups the curves by label, in order of seeds; what cannot be read is named and left out."""
    groups: dict[str, list[Curve]] = defaultdict(list)
    for path in paths:
        try:
            read = read_run if path.is_dir() else read_scratch
            curve = read(path, metric, interval)
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        groups[curve.label].append(curve)
    return {label: sorted(groups[label], key=lambda c: c.seed) for label in sorted(groups)}


def shown(value: float, metric: str) -> str:
    """A rate as a percentage, a return as it is."""
    return f"{value:.1f}" if metric == "return" else f"{100 * value:.0f} %"


def table(groups: dict[str, list[Curve]], metric: str) -> str:
    """A markdown table: a row per step; per label each seed and the median over its seeds."""
    head, rule = ["steps"], ["---:"]
    for label, curves in groups.items():
        head += [f"{label}, seed {c.seed}" for c in curves] + [f"{label}, **median**"]
        rule += ["---:"] * (len(curves) + 1)
    lines = [head, rule]
    steps = sorted({s for curves in groups.values() for c in curves for s in c.scores})
    for step in steps:
        row = [f"{step:,}"]
        for curves in groups.values():
            values = [c.scores.get(step) for c in curves]
            there = [v for v in values if v is not None]
            row += ["" if v is None else shown(v, metric) for v in values]
            whole = len(there) == len(values)  # a median over fewer seeds is another quantity
            row.append(f"**{shown(statistics.median(there), metric)}**" if whole else "")
        lines.append(row)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(groups: dict[str, list[Curve]], metric: str, title: str, path: Path) -> None:
    """Draws all curves into one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    scale = 1 if metric == "return" else 100
    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for i, (label, curves) in enumerate(groups.items()):
        color = COLORS[i % len(COLORS)]
        for curve in curves:
            steps = sorted(curve.scores)
            values = [scale * curve.scores[s] for s in steps]
            axis.plot(steps, values, color=color, lw=0.8, alpha=0.5)
        common = sorted(set.intersection(*(set(c.scores) for c in curves)))
        means = [scale * statistics.fmean(c.scores[s] for c in curves) for s in common]
        seeds = f"{len(curves)} seed{'s' if len(curves) > 1 else ''}"
        name = f"{label} ({seeds})"
        axis.plot(common, means, color=color, lw=2.2, marker="o", ms=4, label=name)
    starts = [c.pretrained for cs in groups.values() for c in cs if c.pretrained is not None]
    if starts:
        level = scale * statistics.fmean(starts)
        axis.axhline(level, ls="--", lw=1, c="black", label="pretrained policy")
    unit = "" if metric == "return" else ", %"
    axis.set(xlabel="environment steps", ylabel=f"{metric.replace('_', ' ')}{unit}", title=title)
    if metric != "return":
        axis.set_ylim(-2, 102)
    axis.grid(alpha=0.3)
    axis.legend(loc="best", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Reads, draws and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", type=Path, nargs="+", help="run folders and .jsonl files")
    parser.add_argument("--out", type=Path, default=Path("learning_curve.png"), help="the picture")
    parser.add_argument("--metric", choices=METRICS, default=METRICS[0])
    parser.add_argument("--interval", type=int, default=10_000, help="of the evaluations")
    parser.add_argument("--title", default="PickCube-v1, state, deterministic evaluation")
    args = parser.parse_args()
    missing = [str(p) for p in args.paths if not p.exists()]
    if missing:
        parser.error(f"no such file or folder: {', '.join(missing)}")
    if args.interval < 1:
        parser.error(f"--interval is {args.interval}; allowed: 1 or more")
    groups = read_all(args.paths, args.metric, args.interval)
    if not groups:
        parser.error("nothing to draw")
    plot(groups, args.metric, args.title, args.out)
    print(table(groups, args.metric))
    print(f"\npicture: {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
