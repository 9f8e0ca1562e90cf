"""Actor adapters: trainable policies on top of a backbone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import Self

from embodied_rl.config import ActorConfig, BatchRenormConfig
from embodied_rl.interfaces.backbone import Backbone
from embodied_rl.types import ActionSample, Features


class ActorAdapter(nn.Module, ABC):
    """A trainable policy on top of a backbone's features.

    Its actions are what the critic judges and replay stores; `decode` makes of them what the
    environment executes.

    Args:
        config: JSON-able arguments of the subclass's constructor, `renorm` among them.

    Attributes:
        base_samples: chunks of the backbone that an observation needs; see `Backbone.forward`.
        action_shape: of its actions for one observation.
        acts_as_demonstrated: whether its actions are those of the environment, so that the critic
            can learn from demonstrations.
        judge: Q [B] of features [B, D] and actions: for adapters that choose among several.
        config_keys: those it reads and not all adapters do; typed beside another, a run says so.
    """

    config_keys: ClassVar[tuple[str, ...]] = ()
    base_samples: int = 1
    action_shape: tuple[int, int]
    acts_as_demonstrated: bool = True
    judge: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self._config = config

    @property
    def target_entropy(self) -> float:
        """What the temperature aims at where the config does not say: minus the action's size."""
        return -float(math.prod(self.action_shape))

    @abstractmethod
    def forward(self, features: Features) -> ActionSample:
        """Samples a chunk [B, H, A] with gradient, and gives the mode beside it."""

    @abstractmethod
    def mode(self, features: Features) -> Tensor:
        """Returns the noise-free chunk [B, H, A]; draws from no generator."""

    def explore(self, features: Features, env_steps: int) -> Tensor:
        """Samples the chunk [B, H, A] that the collector takes after `env_steps` env steps."""
        del env_steps
        return self(features).action

    def backup(self, features: Features) -> ActionSample:
        """Samples the action that the TD target is evaluated at."""
        return self(features)

    def decode(self, backbone: Backbone, features: Features, action: Tensor) -> Tensor:
        """Returns the chunks [B, H, A] to execute for this adapter's actions."""
        del backbone, features
        return action

    def anchor(self, features: Features) -> Tensor:
        """Returns the action [B, *action_shape] that stands for the pretrained policy's."""
        return features.base_action

    def config_dict(self) -> dict[str, Any]:
        """JSON-able arguments that rebuild the module."""
        return dict(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Rebuilds the (untrained) module from `config_dict`."""
        arguments = dict(config)
        if arguments["renorm"] is not None:
            arguments["renorm"] = BatchRenormConfig(**arguments["renorm"])
        return cls(**arguments)

    @classmethod
    @abstractmethod
    def for_backbone(
        cls,
        backbone: Backbone,
        config: ActorConfig,
        renorm: BatchRenormConfig | None,
        execute_steps: int | None = None,
    ) -> ActorAdapter:
        """Builds the adapter that starts as the backbone's policy.

        Args:
            backbone: the policy.
            config: the adapter's settings.
            renorm: Batch Renormalisation settings; None for none.
            execute_steps: actions executed of each chunk, which are all that critic and actor deal
                with; None for all.
        """
