"""`python -m embodied_rl.plan`: what a run would need, before anything is loaded or started."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from embodied_rl import cli
from embodied_rl.command_configs import PlanConfig
from embodied_rl.errors import UserError
from embodied_rl.load_config import CONFIG, load_config

IMAGE_SIZE, EPISODE_STEPS = 128, 50  # assumed where nothing tells; ManiSkill's table-top tasks
JSON = "--json"


def main(args: list[str]) -> int:
    """Prints the plan of the run that `train` with the same words would start; returns 0."""
    to_stdout = JSON in args
    config = _read([a for a in args if a != JSON])

    from embodied_rl.costs.devices import name_devices

    devices = name_devices(
        config.gpu,
        tflops=config.gpu_tflops,
        memory_gib=config.gpu_memory_gib,
        bandwidth=config.gpu_bandwidth,
        gflops=config.gflops,
        cpu_memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
    )

    import torch  # after the arguments were checked: a typo should not wait for imports

    from embodied_rl.costs.estimate import estimate
    from embodied_rl.costs.outlook import outlook
    from embodied_rl.costs.report import document, text
    from embodied_rl.interfaces.sketch import Assumed

    torch.set_num_threads(1)
    assumed = _assumed(config, Assumed)
    plan = estimate(config, assumed, config.gpus)
    outlooks = [outlook(plan, device, config.env_steps_per_s) for device in devices]
    notes = [*assumed.notes, *_notes(config)]
    if to_stdout or config.json is not None:
        dumped = json.dumps(document(plan, outlooks, notes), indent=2) + "\n"
        if config.json is not None:
            _write(Path(config.json), dumped)
        if to_stdout:
            print(dumped, end="")
            return 0
    print(text(plan, outlooks, notes))
    return 0


def _read(args: list[str]) -> PlanConfig:
    resumed = [a.partition("=")[2] for a in args if a.startswith("resume=")]
    if not resumed or resumed[-1] in ("", "null"):
        return load_config(PlanConfig, args)[0]
    recorded = Path(resumed[-1]) / CONFIG
    if not recorded.is_file():
        raise UserError(f"resume={resumed[-1]}: no config.yaml there, so it is not a run folder.")
    return load_config(PlanConfig, args, base=recorded)[0]


def _assumed(config: PlanConfig, kind: Any) -> Any:
    """What the config says about the environment, and defaults, with a note, for the rest."""
    given, env = config.assume, config.env
    notes: list[str] = []
    sensors = env.kwargs.get("sensor_configs")
    width = sensors.get("width") if isinstance(sensors, dict) else None
    image = given.image_size or width
    if image is None and env.obs_mode != "state":
        notes.append(f"images of {IMAGE_SIZE} x {IMAGE_SIZE} pixels (assume.image_size)")
    steps = given.episode_steps or env.max_episode_steps
    if steps is None:
        notes.append(f"episodes of {EPISODE_STEPS} steps (assume.episode_steps)")
    return kind(
        given.state_dim,
        given.action_dim,
        given.cameras,
        image or IMAGE_SIZE,
        steps or EPISODE_STEPS,
        env.name,
        tuple(env.instructions.values()),
        notes,
    )


def _notes(config: PlanConfig) -> list[str]:
    notes = []
    if config.gpus > 1:
        notes.append(
            f"gpus={config.gpus}: data parallel; each device holds all networks and its share of "
            "algorithm.batch_size, env.num_envs and replay"
        )
    if config.algorithm.demo.fraction > 0:
        notes.append("demonstrations, which stay in memory besides, are not counted")
    if config.rollout.asynchronous:
        notes.append("the collecting process holds the policy once more, which is not counted")
    if config.algorithm.replay_buffer.compression != "none":
        notes.append("replay on disk is counted uncompressed")
    return notes


def _write(path: Path, dumped: str) -> None:
    try:
        path.write_text(dumped, encoding="utf-8")
    except OSError as error:
        raise UserError(f"json={path}: cannot write it: {error}") from None


if __name__ == "__main__":
    cli.run("plan", PlanConfig, main)
