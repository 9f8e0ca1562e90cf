"""A policy folder: backbone and, after finetuning, an actor; safetensors + config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from embodied_rl.errors import UserError
from embodied_rl.interfaces import ActorAdapter, Backbone
from embodied_rl.manifest import Damaged, check_file, describe
from embodied_rl.registry import ACTORS, BACKBONES
from embodied_rl.types import Features, Obs

FORMAT, VERSION = "embodied_rl.policy", 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
SHIPPED = Path(__file__).parent / "pretrained"


class Policy(nn.Module):
    """What acts in an environment: a backbone, and an actor adapter if it was finetuned.

    Args:
        backbone: the pretrained policy.
        backbone_type: its name in the registry.
        actor: the adapter on top; None for the pretrained policy itself.
        actor_type: its name in the registry.
        env: the environment settings it was made for, for `evaluate`.
        execute_steps: actions executed of each chunk before the next decision; None for all.
    """

    def __init__(
        self,
        backbone: Backbone,
        backbone_type: str,
        actor: ActorAdapter | None = None,
        actor_type: str | None = None,
        env: dict[str, Any] | None = None,
        execute_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.backbone_type = backbone, backbone_type
        self.actor, self.actor_type = actor, actor_type
        self.env = env or {}
        self.execute_steps = min(execute_steps or backbone.chunk_size, backbone.chunk_size)

    def with_actor(self, actor: ActorAdapter | None) -> Policy:
        """Returns the policy with another actor on the same backbone, or with none."""
        kind = None if actor is None else self.actor_type
        return Policy(self.backbone, self.backbone_type, actor, kind, self.env, self.execute_steps)

    @torch.no_grad()
    def act(self, obs: Obs, *, deterministic: bool = True) -> Tensor:
        """Returns action chunks [B, H, A] in [-1, 1] for observations [B, ...]."""
        return self.act_on(self.encode(obs), deterministic=deterministic)

    @torch.no_grad()
    def encode(self, obs: Obs) -> Features:
        """Returns the backbone's features."""
        self.eval()
        return self.backbone(obs)

    @torch.no_grad()
    def act_on(self, features: Features, *, deterministic: bool = True) -> Tensor:
        """Returns action chunks [B, H, A] for features."""
        if self.actor is None:
            return features.base_action
        return self.actor.mode(features) if deterministic else self.actor(features).action

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
            "env": self.env,
            "execute_steps": self.execute_steps,
        }
        weights = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS)
        config["weights"] = describe(folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Policy:
        """Loads a policy folder, a checkpoint or run folder, or a shipped policy by name.

        Raises:
            UserError: the folder, its config or its weights are missing, damaged or do not agree.
        """
        folder = find_policy(path)
        config = _read_config(folder)
        try:
            backbone_args = dict(config["backbone"])
            backbone_type = backbone_args.pop("type")
            backbone = BACKBONES.get(backbone_type).from_config(backbone_args)
            actor, actor_type = None, None
            if config["actor"] is not None:
                actor_args = dict(config["actor"])
                actor_type = actor_args.pop("type")
                actor = ACTORS.get(actor_type).from_config(actor_args)
            policy = cls(
                backbone, backbone_type, actor, actor_type, config["env"], config["execute_steps"]
            )
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{folder / CONFIG} does not describe a policy ({type(error).__name__}: {error}). "
                "Restore the file, or make the policy anew with python -m embodied_rl.pretrain."
            ) from None
        weights = _read_weights(folder, config)
        try:
            policy.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{folder}: weights and config.json do not agree. {error}") from None
        return policy


def find_policy(path: str | Path) -> Path:
    """Resolves a policy, checkpoint or run folder, or a shipped policy's name, to its folder.

    Raises:
        UserError: nothing there; lists the shipped policies.
    """
    path = Path(path)
    places = [path, path / "policy", path / "checkpoints" / "best" / "policy"]
    for place in [*places, path / "checkpoints" / "last" / "policy", SHIPPED / path]:
        if (place / CONFIG).is_file():
            return place
    shipped = sorted(p.name for p in SHIPPED.glob("*") if p.is_dir())
    what = f"{path} holds no {CONFIG}" if path.is_dir() else f"no folder {path}"
    raise UserError(
        f"cannot load the policy: {what}. Give a policy folder ({CONFIG} + {WEIGHTS}), a run or "
        f"checkpoint folder, or a shipped policy: {', '.join(shipped)}."
    )


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / CONFIG}: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"{folder / CONFIG} is not an {FORMAT} config: its 'format' differs.")
    if config.get("version") != VERSION:
        raise UserError(
            f"{folder / CONFIG} has version {config.get('version')!r}, this embodied_rl reads "
            f"{VERSION}. Upgrade embodied_rl."
        )
    return config


def _read_weights(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(
            f"the policy folder {folder} has no {WEIGHTS}. Copy it there and try again."
        )
    try:
        if "weights" in config:  # policies saved by earlier versions have no checksum
            check_file(path, config["weights"], WEIGHTS)
        return load_file(path)
    except (SafetensorError, OSError, Damaged) as error:
        raise UserError(
            f"{path} is damaged or truncated ({error}). Copy the file again from its source (if "
            f"you changed it yourself: delete its checksum, 'weights', from {CONFIG})."
        ) from None
