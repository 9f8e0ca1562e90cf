"""A policy over proprioceptive state: normalisation and a behaviour-cloned MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embodied_rl.command_configs import PretrainConfig
from embodied_rl.errors import UserError
from embodied_rl.interfaces import Imitator
from embodied_rl.nn import mlp
from embodied_rl.types import EnvSpec, Features, Obs, Trajectory

OBS_KEY = "state"
CLIP = 10.0  # bound on normalised state entries, in standard deviations


class StateBackbone(Imitator):
    """Normalised state as features, an MLP's action chunk as base action.

    Args:
        state_dim: D, size of the flat state `obs["state"]`.
        action_dim: A.
        chunk_size: H.
        hidden: widths of the MLP; None for a base action of zero (runs from scratch).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, state_dim: int, action_dim: int, chunk_size: int = 1, hidden: list[int] | None = None
    ) -> None:
        super().__init__()
        self.feature_dim = state_dim
        self.action_dim = action_dim
        self.chunk_size = chunk_size
        self.hidden = list(hidden) if hidden is not None else None
        self.register_buffer("mean", torch.zeros(state_dim))
        self.register_buffer("std", torch.ones(state_dim))
        self.net: nn.Module | None = None
        if self.hidden is not None:
            self.net = mlp(state_dim, self.hidden, chunk_size * action_dim)

    def set_statistics(self, states: Tensor) -> None:
        """Takes the normalisation from demonstration states [n, D].

        Entries that hardly vary (standard deviation under 1 % of the largest) would turn noise
        into large inputs, so their standard deviation is raised to that floor.
        """
        std = states.std(0, correction=0)
        self.mean.copy_(states.mean(0))
        self.std.copy_(std.clamp(min=float(std.max()) * 0.01 + 1e-8))

    def normalise(self, obs: Obs) -> Tensor:
        """Returns normalised states [B, D]."""
        vector = (obs[OBS_KEY].to(self.mean.dtype) - self.mean) / self.std
        # without demonstrations there is no scale to clip by
        return vector if self.net is None else vector.clamp(-CLIP, CLIP)

    def raw_action(self, vector: Tensor) -> Tensor:
        """Returns unclipped action chunks [B, H, A] for normalised states."""
        shape = (vector.shape[0], self.chunk_size, self.action_dim)
        return vector.new_zeros(shape) if self.net is None else self.net(vector).view(shape)

    def forward(
        self, obs: Obs, samples: int = 1, generator: torch.Generator | None = None
    ) -> Features:
        """Encodes `obs["state"]` [B, D]."""
        del samples, generator  # deterministic
        vector = self.normalise(obs)
        return Features(vector, self.raw_action(vector).clamp(-1, 1))

    def inputs(self, obs: Obs) -> Obs:
        """The state [B, D] as it is."""
        return {OBS_KEY: obs[OBS_KEY]}

    def imitation_loss(
        self, inputs: Obs, chunks: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Mean squared error of the unclipped action chunks."""
        del generator
        return F.mse_loss(self.raw_action(self.normalise(inputs)), chunks)

    @classmethod
    def for_demos(
        cls,
        trajectories: Sequence[Trajectory],
        instructions: Sequence[str],
        config: PretrainConfig,
    ) -> StateBackbone:
        """Normalisation from the demonstrated states; `config` gives widths and chunk length."""
        del instructions
        if f"obs.{OBS_KEY}" not in trajectories[0].fields:
            names = [k for k in trajectories[0].fields if k.startswith("obs.")]
            raise UserError(
                f"backbone=state reads a flat '{OBS_KEY}' observation; the demonstrations have "
                f"{', '.join(names)}. Collect them with env.obs_mode=state, or choose another "
                "backbone."
            )
        states = torch.cat([t.fields[f"obs.{OBS_KEY}"][: t.length] for t in trajectories])
        size = trajectories[0].labels.shape[1]
        backbone = cls(states.shape[1], size, config.chunk_size, list(config.hidden))
        backbone.set_statistics(states)
        return backbone

    def check_env(self, spec: EnvSpec) -> None:
        """Raises UserError where observation or action sizes differ."""
        if OBS_KEY not in spec.obs:
            raise UserError(
                f"the policy reads a flat '{OBS_KEY}' observation, but {spec.name} gives "
                f"{', '.join(spec.obs)}. Set env.obs_mode=state or use a policy with a vision "
                "backbone."
            )
        state_dim = spec.obs[OBS_KEY].shape[0]
        for what, policy, env in (
            ("observation", self.feature_dim, state_dim),
            ("action", self.action_dim, spec.action_dim),
        ):
            if policy != env:
                raise UserError(
                    f"the policy was made for {policy} {what} entries, but {spec.name} has {env}. "
                    "Set env.task, env.obs_mode and env.control_mode as they were when the policy "
                    "was pretrained, or pretrain one for this task: "
                    "python -m embodied_rl.pretrain data=<demonstrations>."
                )

    def config_dict(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "state_dim": self.feature_dim,
            "action_dim": self.action_dim,
            "chunk_size": self.chunk_size,
            "hidden": self.hidden,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> StateBackbone:
        """Rebuilds the module from `config_dict`."""
        return cls(**config)

    @classmethod
    def for_env(cls, spec: EnvSpec) -> StateBackbone:
        """An identity normalisation and a zero base action."""
        if OBS_KEY not in spec.obs:
            raise UserError(
                f"the state backbone reads a flat '{OBS_KEY}' observation, but {spec.name} gives "
                f"{', '.join(spec.obs)}. Set env.obs_mode=state."
            )
        return cls(spec.obs[OBS_KEY].shape[0], spec.action_dim)
