"""`python -m embodied_rl.pretrain`: behaviour cloning from demonstrations."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from embodied_rl import builders, cli
from embodied_rl.config import EnvConfig, PretrainConfig
from embodied_rl.demonstrations import read_demos, read_instructions
from embodied_rl.distributed import LocalEngine
from embodied_rl.errors import UserError
from embodied_rl.evaluator import Evaluator
from embodied_rl.interfaces import Imitator
from embodied_rl.load_config import load_config, save_config
from embodied_rl.policy import Policy
from embodied_rl.registry import BACKBONES
from embodied_rl.types import Obs, Trajectory


def main(args: list[str]) -> int:
    """Clones, evaluates and writes a policy folder; returns 0."""
    config, _ = load_config(PretrainConfig, args)
    if config.data is None:
        raise UserError(
            "data= is missing: a demonstration folder or a ManiSkill .h5 file. Collect some: "
            "python -m embodied_rl.demos out=demos"
        )
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device = builders.build_device(config.device)
    trajectories = read_demos(Path(config.data))[: config.max_trajectories]
    training, validation = split(trajectories, config.validation_fraction, config.seed)
    out = cli.prepare_folder(Path(config.out), config.overwrite)
    instructions = read_instructions(Path(config.data)) or list(config.env.instructions.values())
    policy = clone(config, training, validation, instructions, device)
    builders.check_decisions(config.env, policy)
    out.mkdir(parents=True, exist_ok=True)
    policy.save_pretrained(out)
    save_config(config, out / "pretrain.yaml")
    env = builders.build_env(config.env, config.eval.num_envs, device)
    try:
        policy.backbone.check_env(env.spec)
        video = out / "evaluation.mp4" if config.eval.video else None
        evaluator = Evaluator(env, config.eval.episodes, device)
        summary = evaluator.run(policy, config.eval.seed, video=video).summary
    finally:
        env.close()
    (out / "evaluation.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    tasks = [k for k in summary if k.startswith("success_once/")]
    by_task = "".join(f"\n  {k.partition('/')[2]}: {summary[k]:.1%}" for k in tasks)
    print(
        f"success on {config.eval.episodes} episodes: {summary['success_once']:.1%} (at end "
        f"{summary['success_at_end']:.1%}){by_task}\npolicy: {out}\n"
        f"finetune it: python -m embodied_rl.train policy.path={out} {_env_hint(config)}".rstrip()
    )
    return 0


def _env_hint(config: PretrainConfig) -> str:
    """What `train` must be told besides, where the environment is not its default one."""
    changed = dataclasses.replace(config.env, num_envs=EnvConfig().num_envs) != EnvConfig()
    return f"and the env keys of {Path(config.out) / 'pretrain.yaml'}" if changed else ""


def split(
    trajectories: list[Trajectory], fraction: float, seed: int
) -> tuple[list[Trajectory], list[Trajectory]]:
    """Holds out whole trajectories; returns (training, validation)."""
    order = np.random.default_rng(seed).permutation(len(trajectories))
    held = min(round(fraction * len(trajectories)), len(trajectories) - 1)
    return [trajectories[i] for i in order[held:]], [trajectories[i] for i in order[:held]]


def clone(
    config: PretrainConfig,
    training: list[Trajectory],
    validation: list[Trajectory],
    instructions: Sequence[str],
    device: torch.device,
) -> Policy:
    """Trains a backbone on action chunks, with its own loss."""
    kind = BACKBONES.get(config.backbone)
    if not issubclass(kind, Imitator):
        able = [n for n in BACKBONES.names if issubclass(BACKBONES.get(n), Imitator)]
        raise UserError(
            f"backbone={config.backbone} cannot be trained here. Allowed: {', '.join(able)}."
        )
    backbone = kind.for_demos(training, instructions, config).to(device)
    inputs, chunks = pairs(backbone, training, config.chunk_size, device)
    held_out = pairs(backbone, validation, config.chunk_size, device) if validation else None
    engine = LocalEngine()
    trainable = engine.attach("backbone", backbone.parameters(), config.optim)
    rng = np.random.default_rng(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    bar = tqdm(range(config.steps), unit="step", dynamic_ncols=True)
    for step in bar:
        engine.set_progress(step / config.steps)
        rows = torch.from_numpy(rng.integers(len(chunks), size=config.batch_size)).to(device)
        batch = {k: v[rows] for k, v in inputs.items()}
        loss = backbone.imitation_loss(batch, chunks[rows], generator)
        engine.step(trainable, loss)
        if step % 200 == 0 or step == config.steps - 1:
            shown = {"loss": f"{float(loss.detach()):.5f}"}
            if held_out is not None:
                with torch.no_grad():
                    same = torch.Generator().manual_seed(0)  # comparable from step to step
                    shown["validation"] = f"{float(backbone.imitation_loss(*held_out, same)):.5f}"
            bar.set_postfix(shown)
    env = {key: getattr(config.env, key) for key in builders.ENV_KEYS}
    return Policy(backbone, config.backbone, env=env)


@torch.no_grad()
def pairs(
    backbone: Imitator, trajectories: Sequence[Trajectory], chunk_size: int, device: torch.device
) -> tuple[Obs, Tensor]:
    """What the backbone's loss reads [n, ...], and the next H actions [n, H, A].

    At the end of an episode the last action repeats.
    """
    inputs: dict[str, list[Tensor]] = {}
    chunks = []
    for trajectory in tqdm(trajectories, unit="demo", leave=False, dynamic_ncols=True):
        length, actions = trajectory.length, trajectory.labels
        index = torch.arange(length)[:, None] + torch.arange(chunk_size)
        chunks.append(actions[index.clamp(max=length - 1)])
        obs = {
            k.removeprefix("obs."): v[:length].to(device)
            for k, v in trajectory.fields.items()
            if k.startswith("obs.")
        }
        for key, value in backbone.inputs(obs).items():
            inputs.setdefault(key, []).append(value)
    return {k: torch.cat(v) for k, v in inputs.items()}, torch.cat(chunks).to(device)


if __name__ == "__main__":
    cli.run("pretrain", PretrainConfig, main)
