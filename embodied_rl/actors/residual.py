"""A bounded correction added to the pretrained policy's action (Policy Decorator)."""

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


class ResidualActor(ActorAdapter):
    """a = clip(a_base + xi * delta, -1, 1), delta from a tanh Gaussian over (z, a_base).

    While collecting, delta is applied with probability min(1, t / ramp_steps) (Yuan et al. 2024,
    Policy Decorator, section 4.2). The log-probability is that of delta.

    With several candidates, the policy draws N base actions, and acting and bootstrapping take the
    best of them and of their corrections by Q (Dong et al. 2025, EXPO, section 4). The entropy
    bonus of a base action that was taken as it is counts as zero: it has no density here.

    Args:
        feature_dim: D.
        chunk_size: H.
        action_dim: A.
        hidden: widths of the network.
        scale: xi, the largest correction.
        ramp_steps: environment steps until delta is always applied.
        initial_std: standard deviation of the first corrections, in action units.
        candidates: N.
        renorm: Batch Renormalisation settings; None for none.
    """

    config_keys = (
        "actor.initial_std",
        "actor.residual_scale",
        "actor.residual_ramp_steps",
        "actor.candidates",
    )

    def __init__(
        self,
        feature_dim: int,
        chunk_size: int,
        action_dim: int,
        hidden: list[int],
        scale: float = 0.1,
        ramp_steps: int = 10_000,
        initial_std: float = 0.15,
        candidates: int = 1,
        renorm: BatchRenormConfig | None = None,
    ) -> None:
        super().__init__(
            {
                "feature_dim": feature_dim,
                "chunk_size": chunk_size,
                "action_dim": action_dim,
                "hidden": list(hidden),
                "scale": scale,
                "ramp_steps": ramp_steps,
                "initial_std": initial_std,
                "candidates": candidates,
                "renorm": vars(renorm) if renorm is not None else None,
            }
        )
        self.scale, self.ramp_steps = scale, ramp_steps
        self.base_samples = candidates
        size = chunk_size * action_dim
        self.action_shape = (chunk_size, action_dim)
        self.net = mlp(feature_dim + size, hidden, 2 * size, renorm=renorm)
        tanh_normal.start_at(self.net, math.log(min(initial_std / scale, 1.0)))

    def forward(self, features: Features) -> ActionSample:
        """Samples a corrected chunk; the mode is the base action plus the modal correction."""
        mean, log_std = self.distribution(features)
        delta, log_prob = tanh_normal.sample(mean, log_std)
        return ActionSample(
            self._corrected(features, delta), log_prob, self._corrected(features, torch.tanh(mean))
        )

    def mode(self, features: Features) -> Tensor:
        """Returns the base action plus the modal correction, or the best of several."""
        if self.base_samples > 1:
            return self._best(features, sampled=False).action
        return self._corrected(features, torch.tanh(self.distribution(features)[0]))

    def backup(self, features: Features) -> ActionSample:
        """Samples a corrected chunk, or takes the best of several and of their base actions."""
        return self._best(features, sampled=True) if self.base_samples > 1 else self(features)

    def _best(self, features: Features, *, sampled: bool) -> ActionSample:
        """Argmax of Q over the candidates and their corrections; the mode is the same action."""
        if self.judge is None or features.candidates is None:
            raise ValueError("choosing among candidates needs a critic and their features")
        bases = torch.cat([features.base_action[:, None], features.candidates], 1)
        batch, count = bases.shape[:2]
        each = features.vector.repeat_interleave(count, 0)
        single = Features(each, bases.flatten(0, 1))
        mean, log_std = self.distribution(single)
        delta, log_prob = torch.tanh(mean), mean.new_zeros(len(each))
        if sampled:
            delta, log_prob = tanh_normal.sample(mean, log_std)
        edited = self._corrected(single, delta).unflatten(0, (batch, count))
        options = torch.cat([bases, edited], 1)
        bonus = log_prob.view(batch, count)
        log_probs = torch.cat([torch.zeros_like(bonus), bonus], 1)
        twice = features.vector.repeat_interleave(2 * count, 0)
        chosen = self.judge(twice, options.flatten(0, 1)).view(batch, -1).argmax(1)
        rows = torch.arange(batch, device=chosen.device)
        action = options[rows, chosen]
        return ActionSample(action, log_probs[rows, chosen], action)

    def distribution(self, features: Features) -> tuple[Tensor, Tensor]:
        """Returns mean and log standard deviation of delta before squashing, [B, H, A] each."""
        base = features.base_action
        inputs = torch.cat([features.vector, base.flatten(1)], dim=-1)
        return tanh_normal.split(self.net(inputs), base.shape)

    def _corrected(self, features: Features, delta: Tensor) -> Tensor:
        return (features.base_action + self.scale * delta).clamp(-1, 1)

    def explore(self, features: Features, env_steps: int) -> Tensor:
        """Applies the correction to each environment with probability min(1, t / ramp_steps)."""
        corrected = self.backup(features).action
        if env_steps >= self.ramp_steps:
            return corrected
        base = features.base_action
        apply = torch.rand(base.shape[0], 1, 1, device=base.device) < env_steps / self.ramp_steps
        return torch.where(apply, corrected, base)

    @classmethod
    def for_backbone(
        cls,
        backbone: Backbone,
        config: ActorConfig,
        renorm: BatchRenormConfig | None,
        execute_steps: int | None = None,
    ) -> ResidualActor:
        """Builds the actor that starts as the backbone's policy.

        Raises:
            UserError: several candidates of a policy that always answers the same.
        """
        if config.candidates > 1 and not isinstance(backbone, FlowBackbone):
            raise UserError(
                f"actor.candidates={config.candidates}, but {type(backbone).__name__} has one "
                "action for each observation. Set actor.candidates=1, or start from a policy that "
                "samples (pi0, small_vla)."
            )
        return cls(
            backbone.feature_dim,
            min(execute_steps or backbone.chunk_size, backbone.chunk_size),
            backbone.action_dim,
            config.hidden,
            scale=config.residual_scale,
            ramp_steps=config.residual_ramp_steps,
            initial_std=config.initial_std,
            candidates=config.candidates,
            renorm=renorm,
        )
