"""A policy folder: backbone and, after finetuning, an actor; safetensors + config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from embodied_rl.config import PolicyConfig
from embodied_rl.errors import UserError
from embodied_rl.interfaces import ActorAdapter, Backbone
from embodied_rl.judge import Judge
from embodied_rl.manifest import describe
from embodied_rl.policy_folder import (
    CONFIG,
    FORMAT,
    SHIPPED,
    VERSION,
    WEIGHTS,
    find_policy,
    layout,
    read_config,
    read_weights,
)
from embodied_rl.registry import ACTORS, BACKBONES
from embodied_rl.types import Features, Obs
from embodied_rl.unfreeze import unfreeze

__all__ = ["CONFIG", "FORMAT", "SHIPPED", "Policy", "find_policy"]


class Policy(nn.Module):
    """What acts in an environment: a backbone, and an actor adapter if it was finetuned.

    Args:
        backbone: the pretrained policy.
        backbone_type: its name in the registry.
        actor: the adapter on top; None for the pretrained policy itself.
        actor_type: its name in the registry.
        env: the environment settings it was made for, for `evaluate`.
        execute_steps: actions executed of each chunk before the next decision; None for all.
        judge: critic of an actor that chooses among several actions.
    """

    def __init__(
        self,
        backbone: Backbone,
        backbone_type: str,
        actor: ActorAdapter | None = None,
        actor_type: str | None = None,
        env: dict[str, Any] | None = None,
        execute_steps: int | None = None,
        judge: Judge | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.backbone_type = backbone, backbone_type
        self.actor, self.actor_type = actor, actor_type
        self.env = env or {}
        self.judge = judge
        self.trained: dict[str, Any] | None = None  # how training changed the backbone
        if actor is not None and judge is not None:
            actor.judge = judge.forward  # not the module: it is no part of the actor
        self.execute_steps = min(execute_steps or backbone.chunk_size, backbone.chunk_size)

    def with_actor(self, actor: ActorAdapter | None) -> Policy:
        """Returns the policy with another actor on the same backbone, or with none."""
        kind = None if actor is None else self.actor_type
        judge = None if actor is None else self.judge
        policy = Policy(
            self.backbone, self.backbone_type, actor, kind, self.env, self.execute_steps, judge
        )
        policy.trained = self.trained
        return policy

    def trained_parameters(self) -> list[nn.Parameter]:
        """Those of the backbone's parameters that training moves."""
        return [p for p in self.backbone.parameters() if p.requires_grad] if self.trained else []

    @torch.no_grad()
    def act(
        self,
        obs: Obs,
        *,
        deterministic: bool = True,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Returns the actions to execute, [B, `execute_steps`, A] in [-1, 1].

        Args:
            obs: observations.
            deterministic: take the actor's mode.
            generator: draws the noise of a backbone that samples, the actor's mode given or not;
                None: torch's default one.
        """
        features = self.encode(obs, generator)
        if self.actor is None:
            return features.base_action
        action = self.actor.mode(features) if deterministic else self.actor(features).action
        return self.decode(features, action)

    @torch.no_grad()
    def encode(self, obs: Obs, generator: torch.Generator | None = None) -> Features:
        """Returns the backbone's features, with those actions of its chunks that are executed."""
        parts = (self.backbone,) if self.actor is None else (self.backbone, self.actor)
        if any(part.training for part in parts):  # the learner switches its own
            self.eval()
        samples = 1 if self.actor is None else self.actor.base_samples
        return self.backbone(obs, samples, generator).cut(self.execute_steps)

    @torch.no_grad()
    def decode(self, features: Features, action: Tensor) -> Tensor:
        """Returns what is executed, [B, `execute_steps`, A], for the actor's actions."""
        if self.actor is None:
            return action
        return self.actor.decode(self.backbone, features, action)[:, : self.execute_steps]

    def _elsewhere(self) -> set[str]:
        """Weights that a policy folder leaves in the backbone's own folder, by name."""
        if self.backbone.source is None:
            return set()
        moved = {id(p) for p in self.trained_parameters()}
        names = {f"backbone.{name}" for name in self.backbone.state_dict()}
        return names - {n for n, p in self.named_parameters() if id(p) in moved}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        actor = (
            None if self.actor is None else {"type": self.actor_type, **self.actor.config_dict()}
        )
        config = {
            "format": FORMAT,
            "version": VERSION,
            "backbone": {"type": self.backbone_type, **self.backbone.config_dict()},
            "actor": actor,
            "judge": None if self.judge is None else self.judge.config_dict(),
            "source_hash": self.backbone.source_hash,
            "trained": self.trained,
            "env": self.env,
            "execute_steps": self.execute_steps,
        }
        left = self._elsewhere()
        state = {k: v for k, v in self.state_dict().items() if k not in left}
        weights = {k: v.detach().cpu().contiguous() for k, v in state.items()}
        save_file(weights, folder / WEIGHTS)
        config["weights"] = describe(folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def _from_other(
        cls,
        folder: Path,
        config: dict[str, Any],
        options: PolicyConfig,
        backbone: Backbone | None,
    ) -> Policy:
        kind = layout(folder, config)
        mine: Backbone = backbone or BACKBONES.get(kind).from_folder(folder, options)
        if backbone is None:
            mine.source, mine.source_hash = str(folder.resolve()), mine.weights_hash()
        steps = config.get("n_action_steps")  # LeRobot's name for it
        return cls(mine, kind, execute_steps=steps if isinstance(steps, int) else None)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        options: PolicyConfig | None = None,
        backbone: Backbone | None = None,
    ) -> Policy:
        """Loads a policy folder, a checkpoint or run folder, or a shipped policy by name.

        Args:
            path: one of those; or a folder in another project's layout, which a backbone reads.
            options: what such a folder does not say itself (cameras, tokenizer, precision).
            backbone: the frozen backbone of that policy, where it is in memory already.

        Raises:
            UserError: the folder, its config or its weights are missing, damaged or do not agree.
        """
        folder = find_policy(path)
        config = read_config(folder)
        if config.get("format") != FORMAT:
            return cls._from_other(folder, config, options or PolicyConfig(), backbone)
        try:
            backbone_args = dict(config["backbone"])
            backbone_type = backbone_args.pop("type")
            mine: Backbone = backbone or BACKBONES.get(backbone_type).from_config(backbone_args)
            if backbone is None:
                _check_source(mine, folder, config.get("source_hash"))
            actor, actor_type = None, None
            if config["actor"] is not None:
                actor_args = dict(config["actor"])
                actor_type = actor_args.pop("type")
                actor = ACTORS.get(actor_type).from_config(actor_args)
            trained = config.get("trained")  # earlier versions wrote neither
            if trained is not None and backbone is None:
                unfreeze(mine, PolicyConfig(**trained))
            judge = config.get("judge")
            policy = cls(
                mine,
                backbone_type,
                actor,
                actor_type,
                config["env"],
                config["execute_steps"],
                None if judge is None else Judge.from_config(judge),
            )
            policy.trained = trained
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{folder / CONFIG} does not describe a policy ({type(error).__name__}: {error}). "
                "Restore the file, or make the policy anew with python -m embodied_rl.pretrain."
            ) from None
        weights = read_weights(folder, config)
        here = set() if backbone is None else {f"backbone.{name}" for name in mine.state_dict()}
        try:
            loaded = {k: v for k, v in weights.items() if k not in here}
            missing, unexpected = policy.load_state_dict(loaded, strict=False)
            wrong = [*(set(missing) - policy._elsewhere() - here), *unexpected]
            if wrong:
                raise RuntimeError(f"missing or unexpected: {', '.join(sorted(wrong))}.")
        except RuntimeError as error:
            raise UserError(f"{folder}: weights and config.json do not agree. {error}") from None
        return policy


def _check_source(backbone: Backbone, folder: Path, found: str | None) -> None:
    """Raises UserError if what a policy folder refers to is not what it was."""
    if backbone.source is None:
        return
    backbone.source_hash = backbone.weights_hash()
    if found not in (None, backbone.source_hash):
        raise UserError(
            f"{folder} was finetuned from {backbone.source}, whose weights have "
            "changed since. Put the original files back there, or finetune anew with "
            f"policy.path={backbone.source}."
        )
