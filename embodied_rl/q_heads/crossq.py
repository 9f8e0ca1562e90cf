"""CrossQ: Batch Renormalisation, one joint forward pass, no target network."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from embodied_rl.config import AlgorithmConfig, CriticConfig
from embodied_rl.interfaces import QHead
from embodied_rl.nn import CriticEnsemble


class CrossQHead(QHead):
    """The critic of CrossQ (Bhatt et al. 2024, figure 2 and equation of section 3.3).

    Args:
        feature_dim: D.
        action_size: H * A.
        critic: widths, number of critics and Batch Renormalisation.
        algorithm: not used: there is no target network to configure.
    """

    unused_keys = ("algorithm.tau", "algorithm.target_update_freq")

    def __init__(
        self, feature_dim: int, action_size: int, critic: CriticConfig, algorithm: AlgorithmConfig
    ) -> None:
        super().__init__(feature_dim, action_size, critic, algorithm)
        self.critics = CriticEnsemble(
            feature_dim,
            action_size,
            critic.hidden,
            critic.num_critics,
            critic.batch_renorm,
            critic.matmul_dtype,
        )

    def td_pair(
        self, x: Tensor, action: Tensor, next_x: Tensor, next_action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One training-mode pass over both halves, so that their statistics are shared."""
        self.critics.train()
        q = self.critics(torch.cat([x, next_x]), torch.cat([action, next_action]))
        now, following = q.split(x.shape[0], dim=1)
        return now, following.detach()

    def score(self, x: Tensor, action: Tensor) -> Tensor:
        """Q [K, B] with the running statistics, which stay as they are."""
        self.critics.eval()
        return self.critics(x, action)

    def critic_parameters(self) -> Iterable[nn.Parameter]:
        """All parameters: there is no target network."""
        return self.critics.parameters()

    def after_update(self) -> None:
        """Nothing to average."""
