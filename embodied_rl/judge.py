"""The critic that a policy needs in order to act, where its actor chooses among several actions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor, nn

from embodied_rl.config import AlgorithmConfig, BatchRenormConfig, CriticConfig, OptimConfig
from embodied_rl.interfaces import QHead, aggregate
from embodied_rl.registry import Q_HEADS


class Judge(nn.Module):
    """A Q head and how its critics are aggregated.

    Args:
        head: the critics.
        config: JSON-able arguments that rebuild it; see `describe`.
    """

    def __init__(self, head: QHead, config: dict[str, Any]) -> None:
        super().__init__()
        self.head, self._config = head, config

    def forward(self, x: Tensor, action: Tensor) -> Tensor:
        """Returns Q [B] of features x [B, D] and actions."""
        return aggregate(self.head.score(x, action), self._config["aggregate"])

    def config_dict(self) -> dict[str, Any]:
        """JSON-able arguments that rebuild the module."""
        return dict(self._config)

    @staticmethod
    def describe(
        critic: CriticConfig,
        algorithm: AlgorithmConfig,
        feature_dim: int,
        action_shape: tuple[int, int],
    ) -> dict[str, Any]:
        """What `from_config` needs."""
        return {
            "type": algorithm.q_head_type,
            "aggregate": algorithm.actor_agg_q or algorithm.agg_q,
            "feature_dim": feature_dim,
            "action_size": math.prod(action_shape),
            "critic": dataclasses.asdict(critic),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Judge:
        """Rebuilds the (untrained) module from `config_dict`."""
        critic = dict(config["critic"])
        critic["batch_renorm"] = BatchRenormConfig(**critic["batch_renorm"])
        critic["optim"] = OptimConfig(**critic["optim"])
        head = Q_HEADS.get(config["type"])(
            config["feature_dim"], config["action_size"], CriticConfig(**critic), AlgorithmConfig()
        )
        return cls(head, config)
