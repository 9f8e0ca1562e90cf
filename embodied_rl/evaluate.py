"""`python -m embodied_rl.evaluate`: scores and films a policy on fixed seeds."""

from __future__ import annotations

import json
import time
from pathlib import Path

from embodied_rl import cli
from embodied_rl.command_configs import EvaluateConfig
from embodied_rl.errors import UserError
from embodied_rl.load_config import load_config
from embodied_rl.validate import validate


def main(args: list[str]) -> int:
    """Evaluates; returns 0."""
    config, given = load_config(EvaluateConfig, args)
    if config.policy is None:
        raise UserError(
            "policy= is missing: a policy, checkpoint or run folder, or a shipped name."
        )

    import torch

    from embodied_rl import builders
    from embodied_rl.evaluator import Evaluator
    from embodied_rl.policy import Policy

    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device = builders.build_device(config.device)
    policy = Policy.from_pretrained(config.policy).to(device)
    cli.adopt_env(config.env, policy.env, given)
    validate(config)
    name = Path(config.policy).resolve().name
    stamp = time.strftime("%Y%m%d-%H%M%S")
    out = cli.prepare_folder(Path(config.out or f"evaluations/{name}_{stamp}"), config.overwrite)
    env = builders.build_env(config.env, config.eval.num_envs, device)
    try:
        policy.backbone.check_env(env.spec)
        builders.check_decisions(config.env, policy)
        out.mkdir(parents=True, exist_ok=True)
        evaluator = Evaluator(env, config.eval.episodes, device)
        result = evaluator.run(
            policy,
            config.eval.seed,
            deterministic=config.deterministic,
            video=out / "video.mp4" if config.eval.video else None,
            video_episodes=config.eval.video_episodes,
        )
    finally:
        env.close()
    for warning in env.pop_warnings():
        print(f"warning: {warning}")
    summary = {"policy": config.policy, "first_seed": config.eval.seed, **result.summary}
    (out / "scores.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(
        f"{config.policy} on {config.env.name}: success {result.summary['success_once']:.1%} (at "
        f"end {result.summary['success_at_end']:.1%}), return {result.summary['return']:.2f} over "
        f"{config.eval.episodes} episodes, seeds {config.eval.seed}-"
        f"{config.eval.seed + config.eval.episodes - 1}\nscores and video: {out}"
    )
    return 0


if __name__ == "__main__":
    cli.run("evaluate", EvaluateConfig, main)
