"""The learner of a run on the meta device."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embodied_rl.config import Config
from embodied_rl.costs.ledger import LedgerEngine
from embodied_rl.errors import UserError
from embodied_rl.interfaces import QHead
from embodied_rl.interfaces.sketch import Assumed, Sketch
from embodied_rl.judge import Judge
from embodied_rl.policy import CONFIG, FORMAT, SHIPPED, Policy, find_policy
from embodied_rl.registry import ACTORS, LAYOUTS, Q_HEADS, SKETCHES
from embodied_rl.sac import SAC
from embodied_rl.temperature import Temperature
from embodied_rl.trained_backbone import TrainedBackbone
from embodied_rl.types import Obs
from embodied_rl.unfreeze import describe, unfreeze

META = torch.device("meta")
PUBLISHED = "pi0"  # planned in the place of a policy that is not on this machine yet


class _Bystander(TrainedBackbone):
    """Lets the losses ask for the features' gradient; the backbone's own pass is metered apart."""

    def step(self, obs: Obs, gradient: Tensor) -> Tensor:
        """Does nothing."""
        return gradient.norm()


@dataclass
class Draft:
    """Everything that computes in a run.

    Attributes:
        config: of the run.
        folder: of the pretrained policy; None: from scratch, or not there yet.
        sketch: the backbone and what it observes.
        policy: backbone and actor.
        q_head: the critics.
        sac: the learner; its backbone, if trained, only takes part in the losses.
        engine: what each optimiser owns.
        backbone: the part of the backbone that is trained; None: frozen.
        temperature: the entropy coefficient.
    """

    config: Config
    folder: Path | None
    sketch: Sketch
    policy: Policy
    q_head: QHead
    sac: SAC
    engine: LedgerEngine
    backbone: TrainedBackbone | None
    temperature: Temperature


def draft(config: Config, assumed: Assumed) -> Draft:
    """Builds a run's networks on the meta device.

    Raises:
        UserError: the policy cannot be planned, or the keys do not fit it.
    """
    folder = locate(config, assumed)
    told = _read(folder)
    sketch, kind = _sketch(config, folder, told, assumed)
    with META:
        unfreeze(sketch.backbone, config.policy)
        sketch.backbone.to(META)
        policy = Policy(sketch.backbone, kind, execute_steps=config.rollout.execute_steps)
        actor = told.get("actor")
        policy.actor, policy.actor_type = _actor(config, policy, actor, folder), config.actor.type
        policy.trained = describe(config.policy)
        shape = policy.actor.action_shape
        head = Q_HEADS.get(config.algorithm.q_head_type)
        q_head = head(
            sketch.backbone.feature_dim, math.prod(shape), config.critic, config.algorithm
        )
        tuning = config.algorithm.entropy_tuning
        temperature = Temperature(tuning.alpha_type, tuning.initial_alpha, 0.0, tuning.objective)
        engine, trained = LedgerEngine(), policy.trained_parameters()
        settings = (policy.backbone, trained, engine, config.policy)
        backbone = TrainedBackbone(*settings) if trained else None
        present = _Bystander(*settings) if trained else None
        sac = SAC(policy.actor, q_head, temperature, engine, config, present)
        if policy.actor.base_samples > 1:
            described = Judge.describe(
                config.critic, config.algorithm, policy.backbone.feature_dim, shape
            )
            policy.actor.judge = Judge(q_head, described).forward
    for module in (policy, q_head, sac.average.module):
        _keep_counters(module)
    return Draft(config, folder, sketch, policy, q_head, sac, engine, backbone, temperature)


def locate(config: Config, assumed: Assumed) -> Path | None:
    """The policy's folder; None for a run from scratch, or where it is not there yet.

    Raises:
        UserError: a plain name that no shipped policy has.
    """
    path = config.policy.path
    if path is None:
        return None
    try:
        return find_policy(path)
    except UserError:
        if "/" not in path:  # neither a Hub repository nor a folder: a shipped policy's name
            raise
    assumed.note(
        f"policy: {path} is not on this machine; planned is the published {PUBLISHED} in full size"
    )
    return None


def _read(folder: Path | None) -> dict[str, Any]:
    if folder is None:
        return {}
    try:
        told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / CONFIG}: {error}") from None
    if not isinstance(told, dict):
        raise UserError(f"{folder / CONFIG} describes no policy: it is no object.")
    return told


def _sketch(
    config: Config, folder: Path | None, told: dict[str, Any], assumed: Assumed
) -> tuple[Sketch, str]:
    """The backbone, and its name in the registry."""
    own, foreign = None, None
    if config.policy.path is None:
        kind = config.policy.backbone
    elif folder is None:
        kind = PUBLISHED
    elif told.get("format") == FORMAT:
        own = dict(told["backbone"])
        kind = own.pop("type")
    else:
        layout, foreign = told.get("type", told.get("model_type")), folder
        if layout not in LAYOUTS:
            raise UserError(
                f"{folder / CONFIG} is not an {FORMAT} config, and its type {layout!r} is of no "
                f"known layout. Known: {', '.join(sorted(LAYOUTS))}."
            )
        kind = LAYOUTS[layout]
    try:
        return SKETCHES.get(kind)(own, foreign, config.policy, assumed), kind
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{config.policy.path} does not describe a policy ({type(error).__name__}: {error}). "
            f"Restore its {CONFIG}; policies that come with embodied_rl: "
            f"{', '.join(sorted(p.name for p in SHIPPED.glob('*')))}."
        ) from None


def _actor(config: Config, policy: Policy, told: dict[str, Any] | None, folder: Path | None) -> Any:
    """The actor adapter: a finetuned policy's own, or a new one."""
    kind = config.actor.type
    if told is None:
        renorm = config.critic.batch_renorm if config.actor.batch_renorm else None
        execute = config.rollout.execute_steps
        return ACTORS.get(kind).for_backbone(policy.backbone, config.actor, renorm, execute)
    arguments = dict(told)
    found = arguments.pop("type")
    if found != kind:
        raise UserError(
            f"actor.type={kind}, but {folder} was finetuned with a {found} actor. Set "
            f"actor.type={found}, or start from its pretrained policy."
        )
    return ACTORS.get(kind).from_config(arguments)


def _keep_counters(module: nn.Module) -> None:
    """Gives counters a value: unlike other numbers, they decide what is computed."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.ndim == 0 and not buffer.is_floating_point():
                setattr(part, name, torch.zeros((), dtype=buffer.dtype, device="cpu"))
