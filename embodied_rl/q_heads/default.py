"""SAC's critic: an online ensemble and its Polyak-averaged target."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from embodied_rl.config import AlgorithmConfig, CriticConfig
from embodied_rl.interfaces import QHead
from embodied_rl.nn import CriticEnsemble


class DefaultQHead(QHead):
    """The critic of SAC (Haarnoja et al. 2018, equations 5 and 6).

    Args:
        feature_dim: D.
        action_size: H * A.
        critic: widths and number of critics.
        algorithm: `tau`, the weight of the online parameters in each Polyak step, and
            `target_update_freq`, critic updates per Polyak step.
    """

    unused_keys = (
        "critic.batch_renorm.momentum",
        "critic.batch_renorm.eps",
        "critic.batch_renorm.r_max",
        "critic.batch_renorm.d_max",
        "critic.batch_renorm.warmup_steps",
        "critic.batch_renorm.ramp_steps",
        "critic.batch_renorm.variance",
        "critic.batch_renorm.form",
        "critic.batch_renorm.on_input",
        "critic.batch_renorm.order",
    )
    updates: Tensor

    def __init__(
        self, feature_dim: int, action_size: int, critic: CriticConfig, algorithm: AlgorithmConfig
    ) -> None:
        super().__init__(feature_dim, action_size, critic, algorithm)
        self.tau = algorithm.tau
        self.target_update_freq = algorithm.target_update_freq
        self._follow = get_ema_multi_avg_fn(1 - algorithm.tau)
        self.critics = CriticEnsemble(
            feature_dim,
            action_size,
            critic.hidden,
            critic.num_critics,
            matmul_dtype=critic.matmul_dtype,
        )
        self.target = copy.deepcopy(self.critics).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def td_pair(
        self, x: Tensor, action: Tensor, next_x: Tensor, next_action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The online ensemble on the pair, the target ensemble on the next pair."""
        with torch.no_grad():
            next_q = self.target(next_x, next_action)
        return self.critics(x, action), next_q

    def score(self, x: Tensor, action: Tensor) -> Tensor:
        """Q [K, B] of the online ensemble."""
        return self.critics(x, action)

    def critic_parameters(self) -> Iterable[nn.Parameter]:
        """The online ensemble's parameters."""
        return self.critics.parameters()

    @torch.no_grad()
    def after_update(self) -> None:
        """Moves target <- (1 - tau) * target + tau * online, every `target_update_freq` updates."""
        self.updates.add_(1)
        targets: list[Tensor] = list(self.target.parameters())
        online: list[Tensor] = list(self.critics.parameters())
        if self.target_update_freq == 1:
            self._follow(targets, online, 0)
            return
        due = self.updates % self.target_update_freq == 0  # a tensor: nothing waits for the device
        for target, source in zip(targets, online, strict=True):
            target.lerp_(source, due.to(source) * self.tau)
