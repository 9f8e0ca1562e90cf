"""`python -m embodied_rl.pretrain`: behaviour cloning from demonstrations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from embodied_rl import builders, cli
from embodied_rl.backbones.state import OBS_KEY, StateBackbone
from embodied_rl.config import PretrainConfig
from embodied_rl.demonstrations import read_demos
from embodied_rl.distributed import LocalEngine
from embodied_rl.errors import UserError
from embodied_rl.evaluator import Evaluator
from embodied_rl.load_config import load_config, save_config
from embodied_rl.policy import Policy
from embodied_rl.types import Trajectory


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
    policy = clone(config, training, validation, device)
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
    print(
        f"success on {config.eval.episodes} episodes: {summary['success_once']:.1%} (at end "
        f"{summary['success_at_end']:.1%})\npolicy: {out}\n"
        f"finetune it: python -m embodied_rl.train policy.path={out}"
    )
    return 0


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
    device: torch.device,
) -> Policy:
    """Trains a state backbone by mean squared error on action chunks."""
    states, chunks = pairs(training, config.chunk_size)
    backbone = StateBackbone(
        states.shape[1], chunks.shape[2], config.chunk_size, list(config.hidden)
    )
    backbone.set_statistics(states)
    backbone.to(device)
    engine = LocalEngine()
    trainable = engine.attach("backbone", backbone.parameters(), config.optim)
    rng = np.random.default_rng(config.seed)
    states, chunks = states.to(device), chunks.to(device)
    bar = tqdm(range(config.steps), unit="step", dynamic_ncols=True)
    for step in bar:
        engine.set_progress(step / config.steps)
        rows = torch.from_numpy(rng.integers(len(states), size=config.batch_size)).to(device)
        loss = mse(backbone, states[rows], chunks[rows])
        engine.step(trainable, loss)
        if step % 200 == 0 or step == config.steps - 1:
            shown = {"loss": f"{float(loss.detach()):.5f}"}
            if validation:
                held_out = [t.to(device) for t in pairs(validation, config.chunk_size)]
                with torch.no_grad():
                    shown["validation"] = f"{float(mse(backbone, *held_out)):.5f}"
            bar.set_postfix(shown)
    env = {key: getattr(config.env, key) for key in builders.ENV_KEYS}
    return Policy(backbone, config.backbone, env=env)


def mse(backbone: StateBackbone, states: Tensor, chunks: Tensor) -> Tensor:
    """Mean squared error of the unclipped action chunks."""
    return F.mse_loss(backbone.raw_action(backbone.normalise({OBS_KEY: states})), chunks)


def pairs(trajectories: list[Trajectory], chunk_size: int) -> tuple[Tensor, Tensor]:
    """States [n, D] and the chunks of the next H actions [n, H, A]; the last action repeats."""
    states, chunks = [], []
    for trajectory in trajectories:
        fields = trajectory.fields
        label = fields["expert_action" if "expert_action" in fields else "action"]
        actions = label[: trajectory.length, 0]
        index = torch.arange(trajectory.length)[:, None] + torch.arange(chunk_size)
        chunks.append(actions[index.clamp(max=trajectory.length - 1)])
        states.append(trajectory.fields[f"obs.{OBS_KEY}"][: trajectory.length])
    return torch.cat(states), torch.cat(chunks)


if __name__ == "__main__":
    cli.run("pretrain", PretrainConfig, main)
