"""A plan on a device: whether it fits, and how fast it could go at most."""

from __future__ import annotations

import math
from dataclasses import dataclass

from embodied_rl.costs.devices import GIB, Device
from embodied_rl.costs.estimate import Estimate
from embodied_rl.costs.measure import Cost


@dataclass
class Outlook:
    """Of one device. Times are lower bounds: data-sheet peaks, and nothing else in the way.

    Attributes:
        device: the device.
        spare: bytes left; negative: missing.
        cures: keys that would make it fit, with the bytes that each is worth; best first.
        inference_s: seconds for one inference of all its environments.
        inference_eager_s: the same if each kernel is launched by itself, without CUDA graphs.
        update_s: seconds for one update.
        update_eager_s: the same without CUDA graphs.
        train_s: seconds of the run's own inferences and updates.
        evaluation_s: seconds of its evaluations.
        env_s: seconds of the simulators, training and evaluation; None: their speed is unknown.
        total_s: seconds for the run.
    """

    device: Device
    spare: float
    cures: list[tuple[str, float]]
    inference_s: float
    inference_eager_s: float
    update_s: float
    update_eager_s: float
    train_s: float
    evaluation_s: float
    env_s: tuple[float, float] | None
    total_s: float


def outlook(plan: Estimate, device: Device, env_steps_per_s: float | None) -> Outlook:
    """Puts a plan on a device."""
    config, costs = plan.config, plan.costs
    inference, inference_eager = _seconds(costs.acting, device)
    update, update_eager = _seconds(costs.update, device)
    eval_rows = math.ceil(config.eval.num_envs / plan.devices)
    scored = [part.rows(costs.acting_rows, eval_rows) for part in costs.acting]
    batches, updates, eval_batches = work(plan)
    train = batches * inference + updates * update
    evaluation = eval_batches * _seconds(scored, device)[0]
    env, total = None, train + evaluation
    if env_steps_per_s is not None:
        eval_steps = eval_batches * config.eval.num_envs * plan.draft.policy.execute_steps
        env = config.train.total_steps / env_steps_per_s, eval_steps / env_steps_per_s
        total = max(train, env[0]) + max(evaluation, env[1])  # simulators run beside the updates
    spare = (device.memory_gib - device.reserved_gib) * GIB - plan.memory
    cures = _cures(plan) if spare < 0 else []
    return Outlook(
        device,
        spare,
        cures,
        inference,
        inference_eager,
        update,
        update_eager,
        train,
        evaluation,
        env,
        total,
    )


def work(plan: Estimate) -> tuple[float, float, float]:
    """Inferences of all environments, updates, and inferences of all evaluation environments."""
    config, execute = plan.config, plan.draft.policy.execute_steps
    total, settings = config.train.total_steps, config.eval
    step = config.env.num_envs * config.rollout.steps
    between = math.ceil(total / settings.interval) if settings.interval else 1
    runs = 1 + between + 2  # before, on the way, and the closing comparison of two policies
    decisions = math.ceil(plan.assumed.max_episode_steps / execute)
    rounds = math.ceil(settings.episodes / settings.num_envs)
    return (
        total / (config.env.num_envs * execute),
        math.ceil(total / step) * config.algorithm.update_epoch,
        runs * rounds * decisions,
    )


def _seconds(parts: list[Cost], device: Device) -> tuple[float, float]:
    """At least, and at least in eager mode."""
    best = eager = 0.0
    for part in parts:
        peak = device.single if part.precision == "float32" else device.half
        time = part.flops / (peak * 1e12)
        if device.bandwidth is not None:
            time = max(time, part.weight_bytes / (device.bandwidth * 1e9))
        best += time
        eager += max(time, part.kernels * device.launch_us * 1e-6)
    return best, eager


def _cures(plan: Estimate) -> list[tuple[str, float]]:
    """Keys that lower the peak, and by about how much."""
    config, held, phases = plan.config, plan.held, plan.phases
    worst = max(phases, key=lambda name: phases[name])
    rest = sorted(phases.values())[-2]
    above = phases[worst] - rest  # what lowering the worst phase can bring
    found: list[tuple[str, float]] = []
    if "replay cache" in held:
        found.append(("algorithm.replay_buffer.cache_device=cpu", held["replay cache"]))
    backbone = next(p for p in plan.parts if p.name == "backbone")
    frozen = (backbone.count - backbone.trained) * 4
    if config.policy.dtype == "float32" and config.policy.trainable in ("none", "lora"):
        copies = 3 if worst == "closing comparison" else 1
        found.append(("policy.dtype=bfloat16", copies * frozen / 2))
    if config.policy.trainable in ("last", "full"):
        trained = backbone.trained * 4
        found.append(("policy.trainable=lora", 3 * trained))
    if worst.startswith("update") and worst != "update: heads":
        rows = min(config.policy.micro_batch or plan.batch_rows, plan.batch_rows)
        if rows > 1:
            found.append((f"policy.micro_batch={max(1, rows // 4)}", 0.75 * above))
        if worst == "update: backbone" and not config.policy.gradient_checkpointing:
            found.append(("policy.gradient_checkpointing=true", 0.8 * above))
    if worst == "update: heads":
        found.append(("a smaller critic.hidden or algorithm.batch_size", above / 2))
    if worst == "acting" and plan.acting_rows > 1:
        found.append((f"env.num_envs={max(1, config.env.num_envs // 2)}", above / 2))
    return sorted((c for c in found if c[1] > 0), key=lambda c: -c[1])
