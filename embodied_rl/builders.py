"""Config to objects: the composition root."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from embodied_rl.compiling import Compiled
from embodied_rl.config import Config, EnvConfig
from embodied_rl.cuda_graphs import Graphed
from embodied_rl.demonstrations import check_demos, demo_folder, read_demos, with_features
from embodied_rl.distributed import Ranks, choose_engine
from embodied_rl.errors import UserError
from embodied_rl.interfaces import QHead, ReplayBuffer, VecEnv
from embodied_rl.judge import Judge
from embodied_rl.policy import Policy
from embodied_rl.products import fast_bfloat16
from embodied_rl.registry import ACTORS, BACKBONES, ENVS, Q_HEADS
from embodied_rl.replay.buffer import TrajectoryReplay
from embodied_rl.replay.mixed import MixedReplay, concatenate_features
from embodied_rl.replay.store import TrajectoryStore
from embodied_rl.sac import SAC
from embodied_rl.temperature import Temperature
from embodied_rl.trained_backbone import TrainedBackbone
from embodied_rl.types import EnvSpec, Features, Obs
from embodied_rl.unfreeze import describe, unfreeze

# what `evaluate` must know to score a policy where it was trained
ENV_KEYS = (
    "type",
    "task",
    "instructions",
    "obs_mode",
    "obs_keys",
    "hidden_objects",
    "render_every",
    "control_mode",
    "reward_mode",
    "max_episode_steps",
    "ignore_terminations",
    "kwargs",
)


COMPILE_FROM = 20_000  # updates of a run that train.compile=auto compiles: they win its time back


def build_device(name: str, key: str = "device") -> torch.device:
    """Returns the device that `device=`, or another key, names.

    Raises:
        UserError: an unknown name, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{key}={name!r} is not known. Allowed: auto, cpu, cuda, cuda:N.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"{key}={name}: torch sees {torch.cuda.device_count()} GPUs. Use {key}=auto, or run "
            "python -m embodied_rl.doctor."
        )
    return device


def build_env(config: EnvConfig, num_envs: int, device: torch.device) -> VecEnv:
    """Builds a vector environment."""
    return ENVS.get(config.type)(config, num_envs, device)


def check_decisions(env: EnvConfig, policy: Policy) -> None:
    """Raises UserError where a policy would decide on frames that were drawn steps ago."""
    if policy.execute_steps % env.render_every:
        raise UserError(
            f"env.render_every={env.render_every} draws no frame at some decisions of the policy, "
            f"one every {policy.execute_steps} steps (rollout.execute_steps, else its chunk "
            f"length). Set env.render_every={policy.execute_steps}, a divisor of it, or 1."
        )


def build_policy(config: Config, spec: EnvSpec, device: torch.device) -> Policy:
    """Loads the pretrained policy and puts an untrained actor adapter on it.

    Raises:
        UserError: the policy cannot be loaded or does not fit the environment.
    """
    path = config.policy.path
    if path is None:
        kind = config.policy.backbone
        loaded = Policy(BACKBONES.get(kind).for_env(spec), kind)
    else:
        loaded = Policy.from_pretrained(path, config.policy)
    backbone = loaded.backbone
    backbone.check_env(spec)
    if loaded.trained is None:
        unfreeze(backbone, config.policy)
    elif describe(config.policy) != loaded.trained:
        same = " ".join(f"policy.{key}={value}" for key, value in loaded.trained.items())
        raise UserError(
            f"policy.trainable={config.policy.trainable}, but the backbone in {path} was trained "
            f"already. Go on in the same way: {same}; or start from its pretrained policy."
        )
    execute = config.rollout.execute_steps or loaded.execute_steps
    actor, actor_type = loaded.actor, config.actor.type
    if actor is None:
        renorm = config.critic.batch_renorm if config.actor.batch_renorm else None
        actor = ACTORS.get(actor_type).for_backbone(backbone, config.actor, renorm, execute)
    for key, given, found in (
        ("actor.type", actor_type, loaded.actor_type),
        ("rollout.execute_steps", execute, loaded.execute_steps),
    ):
        if loaded.actor is not None and given != found:
            raise UserError(
                f"{key}={given}, but {path} was finetuned with {found}. Set {key}={found}, or "
                "start from its pretrained policy."
            )
    env = {key: getattr(config.env, key) for key in ENV_KEYS}
    policy = Policy(backbone, loaded.backbone_type, actor, actor_type, env, execute)
    policy.trained = describe(config.policy)
    check_decisions(config.env, policy)
    return policy.to(device)


def build_q_head(config: Config, policy: Policy, device: torch.device) -> QHead:
    """Builds the critics that `algorithm.q_head_type` names."""
    if policy.actor is None:
        raise ValueError("the policy has no actor whose actions a critic could judge")
    backbone, size = policy.backbone, math.prod(policy.actor.action_shape)
    head = Q_HEADS.get(config.algorithm.q_head_type)
    if config.critic.matmul_dtype != "float32" and device.type == "cpu" and not fast_bfloat16():
        print(
            f"note: critic.matmul_dtype={config.critic.matmul_dtype}: this processor has no "
            "instructions for it, so updates will be slower than with float32, not faster"
        )
    return head(backbone.feature_dim, size, config.critic, config.algorithm).to(device)


def build_sac(
    config: Config,
    policy: Policy,
    q_head: QHead,
    device: torch.device,
    say: Callable[[str], None] = print,
    ranks: Ranks | None = None,
) -> SAC:
    """Builds the learner around a policy's actor; `say` is told about compiling it."""
    if policy.actor is None:
        raise ValueError("the policy has no actor to train")
    tuning = config.algorithm.entropy_tuning
    target = tuning.target_entropy
    if target is None:
        target = policy.actor.target_entropy
    temperature = Temperature(tuning.alpha_type, tuning.initial_alpha, target, tuning.objective).to(
        device
    )
    ranks = Ranks() if ranks is None else ranks
    engine = choose_engine(config.train, ranks).build(ranks)
    for module in (policy.actor, q_head):
        ranks.share_statistics(module)
    trained = policy.trained_parameters()
    backbone = TrainedBackbone(policy.backbone, trained, engine, config.policy) if trained else None
    plain = backbone is not None or ranks.world > 1
    if plain and config.train.compile == "always":
        print(
            "note: train.compile=always has no effect: updates that train a backbone, and those "
            "of several processes, are not compiled"
        )
    if config.train.cuda_graphs and (plain or device.type != "cuda"):
        raise UserError(
            f"train.cuda_graphs=true (device {device}, {ranks.world} processes, policy.trainable="
            f"{config.policy.trainable}): it needs a GPU, one process, and policy.trainable=none."
        )
    compile = None if plain else build_compile(config, say)
    sac = SAC(policy.actor, q_head, temperature, engine, config, backbone, compile)
    add_judge(config, policy, q_head)  # after its copy for averaging was made
    return sac


def add_judge(config: Config, policy: Policy, q_head: QHead) -> None:
    """Lets a policy whose actor chooses among several actions ask the critics; others do not."""
    if policy.actor is None or policy.actor.base_samples <= 1:
        return
    described = Judge.describe(
        config.critic, config.algorithm, policy.backbone.feature_dim, policy.actor.action_shape
    )
    policy.judge = Judge(q_head, described)
    policy.actor.judge = policy.judge.forward


def build_compile(
    config: Config, say: Callable[[str], None]
) -> Callable[[Callable[..., Any]], Callable[..., Any]] | None:
    """Returns what makes an update faster, or None where the config is against it."""
    iterations = config.train.total_steps / (config.env.num_envs * config.rollout.steps)
    short = iterations * config.algorithm.update_epoch < COMPILE_FROM
    plain = config.train.compile == "never" or (config.train.compile == "auto" and short)
    if config.train.cuda_graphs:
        return lambda function: Graphed(function if plain else Compiled(function, say))
    return None if plain else lambda function: Compiled(function, say)


def build_encoder(
    policy: Policy, device: torch.device, rows: int | None = None
) -> Callable[[Obs], Features]:
    """Returns the backbone's forward for raw observations from replay, `rows` at a time."""

    def encode(obs: Obs) -> Features:
        count = len(next(iter(obs.values())))
        pieces = [
            policy.encode({k: v[i : i + (rows or count)].to(device) for k, v in obs.items()})
            for i in range(0, count, rows or count)
        ]
        return concatenate_features(pieces)

    return encode


def build_replay(
    config: Config, policy: Policy, folder: Path, device: torch.device, seed: int
) -> ReplayBuffer:
    """Builds the online buffer on disk and, where there are any, mixes in demonstrations.

    Args:
        config: of this process.
        policy: encodes what is drawn.
        folder: of the store.
        device: where batches go.
        seed: of what is drawn.
    """
    algorithm = config.algorithm
    encode = build_encoder(policy, device, config.policy.micro_batch)
    meta = {}
    if config.policy.cache_features:
        meta["fingerprint"] = policy.backbone.fingerprint()
    settings = algorithm.replay_buffer
    store = TrajectoryStore(
        folder,
        settings.segment_size,
        meta,
        max_bytes=settings.max_bytes,
        compression=settings.compression,
    )
    online = TrajectoryReplay(store, algorithm, encode, device, seed=seed)
    path, _ = demo_folder(config)
    if path is None:
        return online
    trajectories = read_demos(path)
    check_demos(path, trajectories, policy)
    if config.policy.cache_features:
        trajectories = [with_features(t, encode) for t in trajectories]
    everything = dataclasses.replace(
        algorithm.replay_buffer,
        enable_cache=True,
        cache_bytes=None,
        prefetch=0,
        cache_size=len(trajectories),
        sample_window_size=len(trajectories),
        min_buffer_size=1,
    )
    whole = dataclasses.replace(algorithm, replay_buffer=everything)
    demos = TrajectoryReplay(None, whole, encode, device, seed=seed + 1, is_demo=True)
    for trajectory in trajectories:
        demos.add(trajectory)
    return MixedReplay(online, demos, algorithm.demo.fraction)
