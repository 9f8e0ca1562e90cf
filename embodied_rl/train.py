"""`python -m embodied_rl.train`: finetunes a pretrained policy in simulation."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embodied_rl import cli
from embodied_rl.config import Config
from embodied_rl.cores import settle
from embodied_rl.envs.fork_server import start_early
from embodied_rl.errors import UserError
from embodied_rl.load_config import CONFIG, load_config, load_run_config, save_config
from embodied_rl.registry import ENVS, FORKED

if TYPE_CHECKING:
    from embodied_rl.distributed import Ranks


def main(args: list[str]) -> int:
    """Trains; returns 0, or 128 + signal number when stopped by one."""
    config, given = _read(args)
    resume = config.resume is not None
    run_dir = Path(config.resume or config.run_dir or _new_name(config))
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run_dir={run_dir} is a file. Name a folder.")
    if not resume and run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(
            f"run_dir={run_dir} is not empty. Continue that run with resume={run_dir}, or name "
            "another folder."
        )
    if config.env.type in FORKED and not config.env.in_process:
        # it imports simulators while this process imports torch
        start_early([ENVS.module(config.env.type)])

    import torch  # after the arguments were checked: a typo should not wait for imports

    from embodied_rl import builders, elastic
    from embodied_rl.collecting_process import open_env
    from embodied_rl.demonstrations import demo_folder
    from embodied_rl.distributed import (
        choose_engine,
        join,
        leave,
        neighbours,
        share,
        train_command,
    )
    from embodied_rl.policy import find_policy
    from embodied_rl.stopping import StopRequest
    from embodied_rl.trainer import Trainer

    ranks, device_name = join(config.device, config.train.rank_timeout)
    device = builders.build_device(device_name)
    config = settle(config, device.type, neighbours())
    assert config.train.threads is not None
    torch.set_num_threads(config.train.threads)
    engine = choose_engine(config.train, ranks)  # refuses early, before simulators start
    part = share(config, ranks)
    first = ranks.rank == 0
    _check_restart(ranks, resume, run_dir, config.auto_resume)
    if engine.note is not None:
        print(f"note: {engine.note}")
    run_dir = Path(ranks.gather_json(str(run_dir))[0])  # its name may hold the time of day
    own_dir = elastic.own_folder(run_dir, ranks.rank, ranks.world)
    deal = elastic.deal(run_dir, ranks, config.seed) if resume else None
    torch.manual_seed(config.seed)  # the same networks everywhere
    for key, choice in without_effect(config, given).items() if first else ():
        print(f"note: {key} has no effect with {choice}")
    if config.policy.path is not None:
        find_policy(config.policy.path)  # fails early, before simulators start
    _, why_no_demos = demo_folder(config)
    if why_no_demos is not None and first:
        print(f"note: {why_no_demos}")
    env = open_env(part, device, config.seed, ranks, run_dir if first else own_dir)
    try:
        with StopRequest() as stop:
            policy = builders.build_policy(config, env.spec, device)
            own_dir.mkdir(parents=True, exist_ok=True)
            if first:
                _announce(config, run_dir, device, resume, ranks.world, engine.name)
            if first or not (run_dir / CONFIG).exists():  # on every machine
                recorded = dataclasses.replace(config, run_dir=None, resume=None, auto_resume=False)
                save_config(recorded, run_dir / CONFIG)
            trainer = Trainer(
                part,
                run_dir if first else own_dir,
                env,
                policy,
                device,
                stop,
                seed=config.seed,
                ranks=ranks,
                replay_dir=own_dir / elastic.REPLAY,
                deal=deal,
            )
            if deal is not None or not first:  # noise of its own; a checkpoint brings its own
                torch.manual_seed(trainer.noise_seed)
            results = trainer.run(resume=resume)
    finally:
        env.close()
    leave()
    if results is None:
        if first:
            print(f"stopped; continue with: {train_command(ranks.world)} resume={run_dir}")
        return stop.exit_code
    if first:
        _report(results, run_dir, config.eval.metric)
    return 0


def _read(args: list[str]) -> tuple[Config, set[str]]:
    resumed = [a.partition("=")[2] for a in args if a.startswith("resume=")]
    if resumed and resumed[-1] not in ("", "null"):
        return load_run_config(Path(resumed[-1]), args)
    config, given = load_config(Config, args)
    if config.auto_resume and (Path(config.run_dir or "") / CONFIG).is_file():
        return load_run_config(Path(config.run_dir or ""), [*args, f"resume={config.run_dir}"])
    return config, given


def _check_restart(ranks: Ranks, resume: bool, run_dir: Path, auto: bool) -> None:
    """Raises UserError where processes would not take up the same run."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if count != "0" and not (resume or auto):
        raise UserError(
            f"torchrun restarted the processes (restart {count}), and this command would begin "
            "anew. Give it run_dir=<folder> and auto_resume=true, so that restarts continue."
        )
    resumes = ranks.gather_json(resume)
    if len(set(resumes)) > 1:
        without = [rank for rank, has in enumerate(resumes) if not has]
        raise UserError(
            f"ranks {without} of {ranks.world} find no run in {run_dir}, the others do. Bring the "
            "run's folders back to their machines, or delete what is left of them."
        )


def _new_name(config: Config) -> str:
    task, head = config.env.name, config.algorithm.q_head_type
    return f"runs/{task}_{head}_s{config.seed}_{time.strftime('%Y%m%d-%H%M%S')}"


def without_effect(config: Config, given: set[str]) -> dict[str, str]:
    """Keys among those `given` that have no effect, and with which choice of Q head or actor."""
    from embodied_rl.registry import ACTORS, Q_HEADS

    head, actor = config.algorithm.q_head_type, config.actor.type
    unused = given & set(Q_HEADS.get(head).unused_keys)
    if config.actor.batch_renorm:  # the actor's own layers read these
        unused = {key for key in unused if not key.startswith("critic.batch_renorm.")}
    others = {key for name in ACTORS.names for key in ACTORS.get(name).config_keys}
    others -= set(ACTORS.get(actor).config_keys)
    return {
        **dict.fromkeys(sorted(unused), f"q_head_type={head}"),
        **dict.fromkeys(sorted(given & others), f"actor.type={actor}"),
    }


def _announce(
    config: Config, run_dir: Path, device: object, resume: bool, world: int, engine: str
) -> None:
    verb = "resuming" if resume else "finetuning"
    where = f"{device}, {world} processes, {engine}" if world > 1 else str(device)
    threads = f"{config.train.threads} thread{'' if config.train.threads == 1 else 's'}"
    print(
        f"{verb} {config.policy.path or 'a fresh policy'} on {config.env.name} with "
        f"q_head_type={config.algorithm.q_head_type} ({config.env.num_envs} environments, "
        f"{config.train.total_steps:,} steps, {where}, {threads})\nrun folder: {run_dir}",
        flush=True,
    )


def _report(results: dict[str, Any], run_dir: Path, metric: str) -> None:
    before, after = results["pretrained"], results["final"]
    held_out = f"{results['episodes']} held-out episodes"
    if metric == "return":
        line = (
            f"return on {held_out}: before {before['return']:.2f} -> final {after['return']:.2f} ("
        )
    else:
        line = (
            f"success on {held_out}: pretrained {before['success_once']:.0%} -> final "
            f"{after['success_once']:.0%} (at end of episode {before['success_at_end']:.0%} -> "
            f"{after['success_at_end']:.0%}; "
        )
    print(
        f"curve, videos, checkpoints: {run_dir}\n"
        f"watch and score again: python -m embodied_rl.evaluate policy={run_dir}\n"
        f"{line}{results['env_steps']:,} steps, {results['seconds'] / 60:.1f} min)"
    )


if __name__ == "__main__":
    cli.run("train", Config, main)
