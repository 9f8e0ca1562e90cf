"""Steers a flow policy by its initial noise, which leaves the policy itself a black box (DSRL)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from embodied_rl.actors import tanh_normal
from embodied_rl.config import ActorConfig, BatchRenormConfig
from embodied_rl.errors import UserError
from embodied_rl.interfaces import ActorAdapter, Backbone, FlowBackbone
from embodied_rl.nn import mlp
from embodied_rl.types import ActionSample, Features


class NoiseActor(ActorAdapter):
    """The action is the noise: w = bound * tanh(u), u ~ N(mu(z), sigma(z)).

    The environment gets the chunk that the flow policy makes of w, repeated over the chunk's
    actions; critic and replay see w / bound in [-1, 1], so that updates never run the policy
    (Wagenmaker et al. 2025, Steering Your Diffusion Policy with Latent Space Reinforcement
    Learning). It starts at mu = 0 and sigma = `initial_std`: with 1, noise about as wide as the
    policy's own.

    Args:
        feature_dim: D.
        noise_dim: W.
        chunk_size: H.
        hidden: widths of the network.
        bound: largest noise.
        initial_std: sigma before any learning.
        renorm: Batch Renormalisation settings; None for none.
    """

    base_samples = 0
    acts_as_demonstrated = False
    config_keys = ("actor.noise_bound", "actor.noise_std")

    def __init__(
        self,
        feature_dim: int,
        noise_dim: int,
        chunk_size: int,
        hidden: list[int],
        bound: float = 1.0,
        initial_std: float = 1.0,
        renorm: BatchRenormConfig | None = None,
    ) -> None:
        super().__init__(
            {
                "feature_dim": feature_dim,
                "noise_dim": noise_dim,
                "chunk_size": chunk_size,
                "hidden": list(hidden),
                "bound": bound,
                "initial_std": initial_std,
                "renorm": vars(renorm) if renorm is not None else None,
            }
        )
        self.bound, self.chunk_size = bound, chunk_size
        self.action_shape = (1, noise_dim)
        self.net = mlp(feature_dim, hidden, 2 * noise_dim, renorm=renorm)
        tanh_normal.start_at(self.net, math.log(initial_std))

    @property
    def target_entropy(self) -> float:
        """Minus half of the noise's size, as in DSRL."""
        return -0.5 * self.action_shape[1]

    def distribution(self, features: Features) -> tuple[Tensor, Tensor]:
        """Returns mean and log standard deviation of u, [B, 1, W] each."""
        shape = torch.Size((len(features.vector), *self.action_shape))
        return tanh_normal.split(self.net(features.vector), shape)

    def forward(self, features: Features) -> ActionSample:
        """Samples w / bound; the mode is tanh(mu)."""
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

    def decode(self, backbone: Backbone, features: Features, action: Tensor) -> Tensor:
        """Runs the flow policy from the noise that `action` stands for."""
        if not isinstance(backbone, FlowBackbone) or features.context is None:
            raise ValueError("noise is decoded from features that a flow backbone has just made")
        noise = (self.bound * action).expand(-1, self.chunk_size, -1)
        return backbone.denoise(features.context, noise).clamp(-1, 1)

    def anchor(self, features: Features) -> Tensor:
        """The most likely noise of the pretrained policy: none."""
        return features.vector.new_zeros(len(features.vector), *self.action_shape)

    @classmethod
    def for_backbone(
        cls,
        backbone: Backbone,
        config: ActorConfig,
        renorm: BatchRenormConfig | None,
        execute_steps: int | None = None,
    ) -> NoiseActor:
        """Builds the actor that starts near the backbone's own noise.

        Raises:
            UserError: the policy draws no noise.
        """
        del execute_steps  # one noise for the whole chunk
        if not isinstance(backbone, FlowBackbone):
            raise UserError(
                f"actor.type=noise steers the noise of a flow policy, but {type(backbone).__name__}"
                " draws none. Set actor.type=residual or actor.type=gaussian, or start from a flow "
                "policy (pi0, small_vla)."
            )
        return cls(
            backbone.feature_dim,
            backbone.noise_dim,
            backbone.chunk_size,
            config.hidden,
            bound=config.noise_bound,
            initial_std=config.noise_std,
            renorm=renorm,
        )
