"""A plan as text and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from embodied_rl.costs.estimate import Estimate
from embodied_rl.costs.measure import Cost
from embodied_rl.costs.outlook import Outlook, work

LINE = 24  # characters of a row's name


def text(plan: Estimate, outlooks: list[Outlook], notes: list[str]) -> str:
    """The plan as one table in sections."""
    lines = [_title(plan), ""]
    lines += ["assumed, for nothing could tell:", *(f"  - {n}" for n in notes), ""]
    lines += [*_parameters(plan), "", *_memory(plan), "", *_replay(plan), "", *_work(plan), ""]
    return "\n".join([*lines, *_devices(plan, outlooks)])


def document(plan: Estimate, outlooks: list[Outlook], notes: list[str]) -> dict[str, Any]:
    """The plan as JSON values; bytes, operations and seconds, nothing rounded."""
    costs, storage = plan.costs, plan.storage
    inferences, updates, evaluations = work(plan)
    named = ("prefix", "denoise", "actor", "decode", "encode", "heads", "backbone")
    parts = {name: getattr(costs, name) for name in named}
    return {
        "policy": plan.config.policy.path,
        "q_head_type": plan.config.algorithm.q_head_type,
        "devices": plan.devices,
        "batch_rows": plan.batch_rows,
        "acting_rows": plan.acting_rows,
        "assumed": notes,
        "parameters": [dataclasses.asdict(part) for part in plan.parts],
        "pretrained_bytes": plan.download,
        "memory": {"held": plan.held, "phases": plan.phases, "total": plan.memory},
        "replay": {
            **dataclasses.asdict(storage),
            "row": storage.row,
            "window_bytes": storage.window_bytes,
            "run_bytes": storage.run_bytes,
            "cache_bytes": storage.cache_bytes,
        },
        "work": {k: None if v is None else dataclasses.asdict(v) for k, v in parts.items()},
        "flops": {"inference": _flops(costs.acting), "update": _flops(costs.update)},
        "run": {
            "inferences": inferences,
            "updates": updates,
            "evaluation_inferences": evaluations,
        },
        "outlook": [
            {**dataclasses.asdict(o), "device": o.device.name, "fits": o.spare >= 0}
            for o in outlooks
        ],
    }


def _flops(costs: list[Cost]) -> float:
    return sum(cost.flops for cost in costs)


def _title(plan: Estimate) -> str:
    config = plan.config
    return (
        f"plan: {config.policy.path or 'a fresh policy'} on {config.env.name}, "
        f"q_head_type={config.algorithm.q_head_type}, actor.type={config.actor.type}, "
        f"{config.train.total_steps:,} steps"
    )


def _row(name: str, *cells: str) -> str:
    return (f"  {name:<{LINE}}" + "".join(f" {cell:>14}" for cell in cells)).rstrip()


def _parameters(plan: Estimate) -> list[str]:
    lines = [_row("PARAMETERS", "count", "trained", "bytes", "precision")]
    for part in plan.parts:
        cells = f"{part.count:,}", f"{part.trained:,}", size(part.nbytes), part.dtype
        lines.append(_row(part.name, *cells))
    total = (sum(p.count for p in plan.parts), sum(p.trained for p in plan.parts))
    lines.append(_row("together", *(f"{n:,}" for n in total), size(plan.held["weights"])))
    if plan.download is not None:
        lines.append(f"  the policy's weights on disk: {size(plan.download)}")
    return lines


def _memory(plan: Estimate) -> list[str]:
    where = "per device" if plan.devices > 1 else "of the device"
    lines = [_row(f"MEMORY {where}", "bytes")]
    lines += [_row(name, size(value)) for name, value in plan.held.items()]
    most = max(plan.phases, key=lambda name: plan.phases[name])
    for name, value in plan.phases.items():
        lines.append(_row(name, size(value), "<- the most" if name == most else ""))
    lines.append(_row("together, with the most", size(plan.memory)))
    replay = plan.storage.cache_bytes
    if not plan.cache_on_device and replay:
        lines.append(f"  in the computer's memory: replay cache {size(replay)}")
    return lines


def _replay(plan: Estimate) -> list[str]:
    s, config = plan.storage, plan.config
    cached, used = config.policy.cache_features, "<- this run"
    lines = [
        _row("REPLAY", "bytes a step"),
        _row("on disk", f"{s.row:,}"),
        f"    observations {s.observations:,}, features {s.features:,}, rest {s.rest:,}",
        _row("in memory: features", f"{s.cached_with_features:,}", used if cached else ""),
        _row("in memory: observations", f"{s.cached_with_images:,}", "" if cached else used),
        _row("disk: window", size(s.window_bytes)),
        f"    {s.window_trajectories:,} trajectories of {s.trajectory_rows:,} rows",
        _row("disk: whole run", size(s.run_bytes)),
    ]
    if config.algorithm.replay_buffer.max_bytes is not None:
        budget = config.algorithm.replay_buffer.max_bytes
        lines.append(_row("disk: at most", size(budget), "(max_bytes)"))
    return lines


def _work(plan: Estimate) -> list[str]:
    c = plan.costs
    lines = [_row("WORK", "FLOPs", "kernels", "weights read")]

    def add(name: str, cost: Cost | None) -> None:
        if cost is not None and cost.kernels:
            cells = flops(cost.flops), f"{cost.kernels:,.0f}", size(cost.weight_bytes)
            lines.append(_row(name, *cells))

    lines.append(f"  one inference, of {c.acting_rows} observation{'s'[: c.acting_rows - 1]}:")
    flow = c.denoise.kernels > 0
    add("  prefix" if flow else "  policy", c.prefix)
    add("  denoising", c.denoise)
    add("  actor", c.actor)
    add("  actor's chunks", c.decode)
    lines.append(_row("  together", flops(_flops(c.acting))))
    lines.append(f"  one update of {plan.batch_rows} rows:")
    add("  encoding, both sides", c.encode)
    add("  critics and actor", c.heads)
    add("  backbone, trained", c.backbone)
    lines.append(_row("  together", flops(_flops(c.update))))
    inferences, updates, evaluations = work(plan)
    lines.append(
        f"  the run: {inferences:,.0f} inferences and {updates:,.0f} updates at most; "
        f"{evaluations:,.0f} inferences in evaluations"
    )
    return lines


def _devices(plan: Estimate, outlooks: list[Outlook]) -> list[str]:
    heads = ("spare", "decisions/s", "eager", "updates/s", "eager", "run, at least")
    lines = [f"  {'DEVICE':<12}" + "".join(f" {head:>13}" for head in heads)]
    for o in outlooks:
        cells = (
            size(o.spare),
            rate(o.inference_s / plan.acting_rows),
            rate(o.inference_eager_s / plan.acting_rows) if o.device.launch_us else "",
            rate(o.update_s),
            rate(o.update_eager_s) if o.device.launch_us else "",
            duration(o.total_s),
        )
        lines.append(f"  {o.device.name:<12}" + "".join(f" {cell:>13}" for cell in cells))
    lines += [_verdict(plan, o) for o in outlooks]
    lines.append(
        "  Rates are ceilings, not promises: data-sheet peaks of products and memory, nothing else "
        "in the way.\n  'eager' adds "
        f"{max(o.device.launch_us for o in outlooks) or 5:g} us for each kernel, as without CUDA "
        "graphs or compilation."
    )
    if outlooks and outlooks[0].env_s is None:
        lines.append(
            "  The simulators' time is not in it: measure their steps per second and set "
            "env_steps_per_s=."
        )
    return lines


def _verdict(plan: Estimate, o: Outlook) -> str:
    usable = o.device.memory_gib - o.device.reserved_gib
    need = f"{size(plan.memory)} of {usable:.1f} GiB"
    if o.spare >= 0:
        return f"  {o.device.name}: fits ({need})"
    cures = "; ".join(f"{key} (about -{size(value)})" for key, value in o.cures)
    return (
        f"  {o.device.name}: does not fit, {size(-o.spare)} missing ({need}). "
        f"{'What would help: ' + cures if cures else 'No key helps: take a larger device'}."
    )


def size(count: float) -> str:
    """Bytes in a unit that fits."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def flops(count: float) -> str:
    """Operations in a unit that fits."""
    for unit, scale in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} FLOP"


def rate(seconds: float) -> str:
    """How often in a second."""
    return f"{1 / seconds:,.3g}" if 1 / seconds < 100 else f"{1 / seconds:,.0f}"


def duration(seconds: float) -> str:
    """Seconds in a unit that fits."""
    for unit, scale in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.1f} s"
