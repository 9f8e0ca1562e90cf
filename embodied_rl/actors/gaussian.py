"""A tanh-Gaussian policy that starts as the pretrained one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from embodied_rl.actors import tanh_normal
from embodied_rl.config import ActorConfig, BatchRenormConfig
from embodied_rl.interfaces import ActorAdapter, Backbone
from embodied_rl.nn import mlp
from embodied_rl.types import ActionSample, Features

BASE_LIMIT = 0.97  # |base action| is clipped here before atanh: keeps a gradient in every entry


class GaussianActor(ActorAdapter):
    """a = tanh(mu(z) + sigma(z) eps), with mu(z) = atanh(base action) + f(z).

    The last layer of f starts at zero, so the initial mode is the pretrained policy's action for
    any backbone, and sigma starts at `initial_std` in every state.

    Args:
        feature_dim: D.
        chunk_size: H.
        action_dim: A.
        hidden: widths of f.
        initial_std: sigma before any learning.
        renorm: Batch Renormalisation settings; None for none.
    """

    config_keys = ("actor.initial_std",)

    def __init__(
        self,
        feature_dim: int,
        chunk_size: int,
        action_dim: int,
        hidden: list[int],
        initial_std: float = 0.15,
        renorm: BatchRenormConfig | None = None,
    ) -> None:
        super().__init__(
            {
                "feature_dim": feature_dim,
                "chunk_size": chunk_size,
                "action_dim": action_dim,
                "hidden": list(hidden),
                "initial_std": initial_std,
                "renorm": vars(renorm) if renorm is not None else None,
            }
        )
        self.action_shape = (chunk_size, action_dim)
        self.net = mlp(feature_dim, hidden, 2 * chunk_size * action_dim, renorm=renorm)
        tanh_normal.start_at(self.net, math.log(initial_std))

    def distribution(self, features: Features) -> tuple[Tensor, Tensor]:
        """Returns mean and log standard deviation before squashing, [B, H, A] each."""
        base = features.base_action
        shift, log_std = tanh_normal.split(self.net(features.vector), base.shape)
        return torch.atanh(base.clamp(-BASE_LIMIT, BASE_LIMIT)) + shift, log_std

    def forward(self, features: Features) -> ActionSample:
        """Samples a chunk; the mode is tanh(mu)."""
        mean, log_std = self.distribution(features)
        action, log_prob = tanh_normal.sample(mean, log_std)
        return ActionSample(action, log_prob, torch.tanh(mean))

    def explore(self, features: Features, env_steps: int) -> Tensor:
        """Samples as `forward` does."""
        del env_steps
        return tanh_normal.explore(*self.distribution(features))

    def mode(self, features: Features) -> Tensor:
        """Returns tanh(mu)."""
        return torch.tanh(self.distribution(features)[0])

    @classmethod
    def for_backbone(
        cls,
        backbone: Backbone,
        config: ActorConfig,
        renorm: BatchRenormConfig | None,
        execute_steps: int | None = None,
    ) -> GaussianActor:
        """Builds the actor that starts as the backbone's policy."""
        return cls(
            backbone.feature_dim,
            min(execute_steps or backbone.chunk_size, backbone.chunk_size),
            backbone.action_dim,
            config.hidden,
            initial_std=config.initial_std,
            renorm=renorm,
        )
