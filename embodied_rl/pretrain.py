"""`python -m embodied_rl.pretrain`: behaviour cloning, from nothing or from a trained policy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np
import torch

from embodied_rl import builders, cli
from embodied_rl.backbones.lerobot_folder import read_json
from embodied_rl.cloning import fit
from embodied_rl.command_configs import PretrainConfig
from embodied_rl.config import EnvConfig, PolicyConfig
from embodied_rl.demonstrations import read_demos, read_meta, shown_spec
from embodied_rl.errors import UserError
from embodied_rl.evaluator import Evaluator
from embodied_rl.interfaces import Imitator
from embodied_rl.load_config import load_config, save_config
from embodied_rl.policy import Policy
from embodied_rl.policy_folder import CONFIG, find_policy
from embodied_rl.registry import BACKBONES
from embodied_rl.types import Trajectory
from embodied_rl.unfreeze import add_lora, merge_lora
from embodied_rl.validate import validate


def main(args: list[str]) -> int:
    """Clones, evaluates and writes a policy folder; returns 0."""
    config, given = load_config(PretrainConfig, args)
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
    meta = read_meta(Path(config.data))
    cli.adopt_env(config.env, meta.get("env", {}), given)
    loaded = None if config.init is None else load_init(config, given)
    if loaded is not None:
        cli.adopt_env(config.env, loaded[0].env, given)
        builders.check_decisions(config.env, loaded[0])
    validate(config)
    instructions = meta.get("instructions") or list(config.env.instructions.values())
    check_out(config, None if loaded is None else loaded[1].source)
    out = cli.prepare_folder(Path(config.out), config.overwrite)
    if loaded is None:
        policy = clone(config, training, validation, instructions, device)
    else:
        told = meta.get("told", config.env.name)
        loaded[1].check_env(shown_spec(trajectories, instructions, told))
        policy = go_on(config, *loaded, training, validation, device)
    builders.check_decisions(config.env, policy)
    out.mkdir(parents=True, exist_ok=True)
    save(policy, out)
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


def check_out(config: PretrainConfig, source: str | None = None) -> None:
    """Raises UserError where `overwrite` would take away what training or its result reads.

    Args:
        config: says where to write, and from what.
        source: folder that holds the weights of `init`, where it only refers to them.
    """
    out = Path(config.out).resolve()
    read = {"data": Path(config.data or "")}
    if config.init is not None:
        read["init"] = find_policy(config.init)
    if source is not None:
        read["the weights of init"] = Path(source)
    for key, path in read.items():
        if path.resolve().is_relative_to(out):
            raise UserError(f"out={config.out} holds {key}={path}. Name another folder.")


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
    """Trains a new backbone on action chunks, with its own loss."""
    kind = BACKBONES.get(config.backbone)
    if not issubclass(kind, Imitator):
        raise UserError(f"backbone={config.backbone} cannot be trained here. {_able()}")
    backbone = kind.for_demos(training, instructions, config).to(device)
    fit(backbone, config, training, validation, device)
    env = {key: getattr(config.env, key) for key in builders.ENV_KEYS}
    return Policy(backbone, config.backbone, env=env)


def load_init(config: PretrainConfig, given: Set[str]) -> tuple[Policy, Imitator]:
    """Loads the policy that training goes on from, without the adapter that finetuning put on it.

    What the config says of a new backbone becomes what this one is.

    Raises:
        UserError: it cannot be loaded or trained, or is not what the user typed beside `init`.
    """
    assert config.init is not None
    tune = config.tune
    options = PolicyConfig(
        path=config.init,
        cameras=tune.cameras,
        state=tune.state,
        tokenizer=tune.tokenizer,
        dtype=tune.dtype,
    )
    loaded = Policy.from_pretrained(config.init, options)
    backbone, kind = loaded.backbone, loaded.backbone_type
    if not isinstance(backbone, Imitator):
        raise UserError(f"init={config.init} is of the kind {kind}, not trained here. {_able()}")
    for key, found in (("backbone", kind), ("chunk_size", backbone.chunk_size)):
        if key in given and getattr(config, key) != found:
            raise UserError(
                f"{key}={getattr(config, key)}, but init={config.init} has {found}. Drop {key}."
            )
        setattr(config, key, found)
    if "optim.lr" not in given:
        config.optim.lr = backbone.tuning_rate
    if loaded.trained is not None and loaded.trained["trainable"] == "lora":
        merge_lora(backbone)
    return loaded, backbone


def go_on(
    config: PretrainConfig,
    loaded: Policy,
    backbone: Imitator,
    training: list[Trajectory],
    validation: list[Trajectory],
    device: torch.device,
) -> Policy:
    """Trains the backbone of a policy further: the result is that backbone alone.

    Args:
        config: `tune` says what of it changes.
        loaded: the policy, connected to the environment of the demonstrations.
        backbone: its backbone.
        training: to learn from.
        validation: to watch.
        device: where it runs.
    """
    backbone.to(device)
    if config.tune.trainable == "lora":
        backbone.requires_grad_(False)
        add_lora(backbone, [backbone], config.tune.lora_rank)
    else:
        backbone.requires_grad_(True)
    fit(backbone.eval(), config, training, validation, device)
    if config.tune.trainable == "lora":
        merge_lora(backbone)
    backbone.requires_grad_(False)
    env = {key: getattr(config.env, key) for key in builders.ENV_KEYS}
    return Policy(backbone, loaded.backbone_type, env=env, execute_steps=loaded.execute_steps)


def save(policy: Policy, out: Path) -> None:
    """Writes the policy in the layout that its backbone came from."""
    if policy.backbone.source is None:
        policy.save_pretrained(out)
        return
    policy.backbone.to_folder(out)
    steps = read_json(out / CONFIG).get("n_action_steps")
    if isinstance(steps, int) and steps != policy.execute_steps:
        print(
            f"note: {out / CONFIG} is that of {policy.backbone.source} and says n_action_steps="
            f"{steps}, but the policy was finetuned with {policy.execute_steps}: set it there."
        )


def _able() -> str:
    able = [n for n in BACKBONES.names if issubclass(BACKBONES.get(n), Imitator)]
    return f"Allowed: {', '.join(able)}."


if __name__ == "__main__":
    cli.run("pretrain", PretrainConfig, main)
