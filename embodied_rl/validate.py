"""Checks config values, alone (`allowed.py`) and together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from embodied_rl.allowed import CHOICES, RANGES
from embodied_rl.command_configs import DemosConfig, PretrainConfig
from embodied_rl.config import Config, EnvConfig, RolloutConfig
from embodied_rl.errors import UserError, nearest


def validate(config: Any) -> None:
    """Checks every value of a config object, then the keys that depend on one another.

    Raises:
        UserError: names the key, the value received and what is allowed.
    """
    for key, value in leaves(config):
        if value is None:
            continue
        allowed = CHOICES.get(key)
        if allowed is not None and value not in allowed:
            raise UserError(
                f"{key}={value!r} is not allowed. Allowed: {', '.join(allowed)}."
                f"{nearest(str(value), allowed)}"
            )
        interval = _interval(key)
        if interval is not None:
            for number in value if isinstance(value, list) else [value]:
                _check_range(key, number, interval)
        if key.endswith("betas") and len(value) != 2:
            raise UserError(
                f"{key}={value} has {len(value)} entries. Allowed: two, each in [0, 1)."
            )
    if isinstance(getattr(config, "env", None), EnvConfig):
        _check_env(config.env)
    if isinstance(config, Config):
        _check_together(config)
    if isinstance(config, PretrainConfig):
        _check_pretrain(config)
    if isinstance(config, DemosConfig) and config.policy is None and not config.deterministic:
        raise UserError(
            "deterministic=false is for policies that demonstrate: name one with policy=, or drop "
            "it (noise= perturbs scripted experts)."
        )


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of a nested config object."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value


def _interval(key: str) -> tuple[str, float, float, str] | None:
    """The longest matching end of a dotted key wins: `eval.seed` before `seed`."""
    parts = key.split(".")
    for start in range(len(parts)):
        found = RANGES.get(".".join(parts[start:]))
        if found is not None:
            return found
    return None


def _check_range(key: str, value: Any, interval: tuple[str, float, float, str]) -> None:
    left, low, high, right = interval
    above = value >= low if left == "[" else value > low
    below = value <= high if right == "]" else value < high
    if not (above and below):
        bounds = f"{left}{_show(low)}, {_show(high)}{right}"
        raise UserError(f"{key}={value} is out of range. Allowed: {bounds}.")


def _show(bound: float) -> str:
    return "infinity" if math.isinf(bound) else f"{bound:g}"


def _check_env(env: EnvConfig) -> None:
    for key in ("instructions", "obs_keys", "hidden_objects"):
        value = getattr(env, key)
        if value and env.type != "maniskill":
            raise UserError(
                f"env.{key}={value} is for env.type=maniskill, but env.type={env.type}. Drop one."
            )
    if env.render_every > 1 and env.type != "maniskill":
        raise UserError(
            f"env.render_every={env.render_every} is for env.type=maniskill, but env.type="
            f"{env.type}. Drop one."
        )
    if env.in_process and env.type != "gymnasium":
        raise UserError(
            f"env.in_process=true is for env.type=gymnasium, but env.type={env.type}. Drop one."
        )
    if env.in_process and env.worker_timeout != EnvConfig.worker_timeout:
        raise UserError(
            f"env.worker_timeout={env.worker_timeout:g} is for worker processes; with "
            "env.in_process=true there are none. Drop one."
        )
    if env.obs_keys and env.obs_mode == "state":
        raise UserError(
            f"env.obs_keys={env.obs_keys} chooses among named observations, but env.obs_mode=state "
            "gives a single one. Drop the keys, or set env.obs_mode=state_dict or rgb."
        )
    if not env.instructions:
        return
    if env.task not in env.instructions:
        raise UserError(
            f"env.task={env.task} is not among the tasks of env.instructions: "
            f"{', '.join(env.instructions)}. Drop env.task, or give it an instruction."
        )
    texts = list(env.instructions.values())
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"env.instructions={env.instructions} has an empty instruction.")
    if len(set(texts)) < len(texts):
        raise UserError(
            f"env.instructions={env.instructions} tells two tasks apart by nothing. Give each its "
            "own instruction."
        )


def _check_pretrain(config: PretrainConfig) -> None:
    """Sizes are for new backbones, `tune` for those that `init` names."""
    usual = PretrainConfig()
    if config.init is None:
        keys = [f"tune.{f.name}" for f in dataclasses.fields(config.tune)]
        keys.remove("tune.micro_batch")
        without = "no policy is named for it: give init=, or drop it"
    else:
        keys = ["hidden", *(f"small_vla.{f.name}" for f in dataclasses.fields(config.small_vla))]
        without = f"init={config.init} has its sizes already: drop one of them"
    given, default = dict(leaves(config)), dict(leaves(usual))
    for key in keys:
        if given[key] != default[key]:
            raise UserError(f"{key}={given[key]}, but {without}.")


def _check_together(config: Config) -> None:
    algorithm, replay = config.algorithm, config.algorithm.replay_buffer
    if replay.min_buffer_size > replay.sample_window_size:
        raise UserError(
            f"algorithm.replay_buffer.min_buffer_size={replay.min_buffer_size} is larger than "
            f"algorithm.replay_buffer.sample_window_size={replay.sample_window_size}: training "
            "would never start. Lower the first or raise the second."
        )
    if config.resume is not None and config.run_dir is not None and config.run_dir != config.resume:
        raise UserError(
            f"resume={config.resume} continues in its own folder; drop run_dir={config.run_dir}."
        )
    if config.auto_resume and config.run_dir is None:
        raise UserError(
            "auto_resume=true continues the run in run_dir, and run_dir is null. Set run_dir."
        )
    if config.actor.batch_renorm and config.actor.average_decay > 0:
        raise UserError(
            f"actor.batch_renorm=true with actor.average_decay={config.actor.average_decay}: "
            "averaged weights would run on the statistics of the latest ones. Set "
            "actor.average_decay=0, or actor.batch_renorm=false."
        )
    first, last = config.eval.seed, config.eval.seed + config.eval.episodes
    if first < config.eval.final_seed + config.eval.episodes and config.eval.final_seed < last:
        raise UserError(
            f"eval.seed={first} and eval.final_seed={config.eval.final_seed} overlap over "
            f"eval.episodes={config.eval.episodes}: the closing comparison would not be held out."
        )
    policy = config.policy
    if policy.trainable != "none" and policy.cache_features:
        raise UserError(
            f"policy.trainable={policy.trainable} with policy.cache_features=true: stored features "
            "would be those of weights that have changed since. Set policy.cache_features=false, "
            "or policy.trainable=none."
        )
    rollout, usual = config.rollout, RolloutConfig()
    for key in ("ahead", "device"):
        value = getattr(rollout, key)
        if not rollout.asynchronous and value != getattr(usual, key):
            raise UserError(
                f"rollout.{key}={value} is for a collecting process of its own, but "
                f"rollout.asynchronous=false. Set rollout.asynchronous=true, or drop rollout.{key}."
            )
    if rollout.asynchronous and rollout.overlap is False:
        raise UserError(
            "rollout.asynchronous=true collects while this process learns, which rollout.overlap="
            "false forbids. Drop one of the two; rollout.overlap=null leaves it to the run."
        )
    if algorithm.demo.path is not None and algorithm.demo.fraction == 0:
        raise UserError(
            "algorithm.demo.path is set but algorithm.demo.fraction=0 would never read it. "
            "Set a fraction above 0 or drop the path."
        )
