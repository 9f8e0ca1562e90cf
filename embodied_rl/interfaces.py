"""The seams of the trainer: what each layer promises to the others.

Sizes: B batch, H chunk length, A action size, D feature size, K critics, N environments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn
from typing_extensions import Self

from embodied_rl.config import ActorConfig, AlgorithmConfig, BatchRenormConfig, CriticConfig
from embodied_rl.types import ActionSample, Batch, EnvSpec, Features, Obs, StepResult, Trajectory


@runtime_checkable
class Stateful(Protocol):
    """Anything a checkpoint saves: nested dicts of tensors and JSON values."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state to save."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Restores what `state_dict` returned."""
        ...


class Backbone(nn.Module, ABC):
    """A pretrained policy: observations to features and a base action.

    Owns preprocessing and normalisation; knows nothing of Q values or algorithms.
    """

    feature_dim: int
    chunk_size: int
    action_dim: int
    frozen: bool = True

    @abstractmethod
    def forward(self, obs: Obs) -> Features:
        """Encodes observations [B, ...] to features [B, D] and base actions [B, H, A]."""

    @abstractmethod
    def check_env(self, spec: EnvSpec) -> None:
        """Raises UserError where the environment does not fit this policy."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of weights and preprocessing; cached features carry it."""

    @abstractmethod
    def config_dict(self) -> dict[str, Any]:
        """JSON-able arguments that rebuild the (untrained) module."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> Backbone:
        """Rebuilds the module from `config_dict`."""

    @classmethod
    @abstractmethod
    def for_env(cls, spec: EnvSpec) -> Backbone:
        """Builds an untrained backbone for runs from scratch."""


class ActorAdapter(nn.Module, ABC):
    """A trainable policy on top of a backbone's features.

    Args:
        config: JSON-able arguments of the subclass's constructor, `renorm` among them.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self._config = config

    @abstractmethod
    def forward(self, features: Features) -> ActionSample:
        """Samples a chunk [B, H, A] with gradient, and gives the mode beside it."""

    @abstractmethod
    def mode(self, features: Features) -> Tensor:
        """Returns the noise-free chunk [B, H, A]; draws from no generator."""

    def explore(self, features: Features, env_steps: int) -> ActionSample:
        """Samples the chunk that the collector executes after `env_steps` steps of training."""
        del env_steps
        return self(features)

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
        cls, backbone: Backbone, config: ActorConfig, renorm: BatchRenormConfig | None
    ) -> ActorAdapter:
        """Builds the adapter that starts as the backbone's policy."""


class QHead(nn.Module, ABC):
    """The critic ensemble and its way of bootstrapping: where CrossQ and SAC differ."""

    unused_keys: ClassVar[tuple[str, ...]] = ()  # config keys that this head has no use for

    def __init__(
        self, feature_dim: int, action_size: int, critic: CriticConfig, algorithm: AlgorithmConfig
    ) -> None:
        """The signature every head has: features [B, D], flattened chunks [B, H * A]."""
        super().__init__()

    @abstractmethod
    def td_pair(
        self, x: Tensor, action: Tensor, next_x: Tensor, next_action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Evaluates a batch of transitions for the TD loss.

        Args:
            x: [B, D] features.
            action: [B, H, A].
            next_x: [B, D] features of the next state.
            next_action: [B, H, A] chosen there by the present policy.

        Returns:
            q [K, B] with gradient and next_q [K, B] without.
        """

    @abstractmethod
    def score(self, x: Tensor, action: Tensor) -> Tensor:
        """Returns Q [K, B] for the actor loss; leaves every statistic untouched."""

    @abstractmethod
    def critic_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters that the critic's optimiser owns."""

    @abstractmethod
    def after_update(self) -> None:
        """Runs after each critic step (Polyak averaging in the default head)."""


class ReplayBuffer(ABC):
    """Trajectories in, batches of transitions out."""

    @property
    @abstractmethod
    def problems(self) -> list[str]:
        """One line for each damaged file that opening left out."""

    @abstractmethod
    def add(self, trajectory: Trajectory) -> None:
        """Appends one trajectory."""

    @abstractmethod
    def sample(self, n: int) -> Batch:
        """Returns exactly n transitions, or raises ReplayNotReady."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Generators, and what the disk holds by now."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to the trajectories and generators of a checkpoint."""

    @abstractmethod
    def close(self) -> None:
        """Writes what is not on disk yet and lets go of the files."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether `sample` would return."""


class VecEnv(ABC):
    """N environments stepped together, with autoreset."""

    num_envs: int
    spec: EnvSpec

    @abstractmethod
    def reset(self, seeds: Sequence[int]) -> Obs:
        """Starts a new episode in every environment, each from its own seed.

        What ran before leaves no trace: an evaluation starts here.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What `resume` needs to come back to where every environment is (not inside a step)."""

    @abstractmethod
    def resume(self, state: dict[str, Any], next_seeds: Sequence[int]) -> tuple[Obs, Tensor]:
        """Goes back to a state, in the middle of episodes.

        Args:
            state: what `state_dict` returned, of as many environments.
            next_seeds: per environment, the seed of the episode after its present one.

        Returns:
            Observations to act on, and [N] bool `restarted`: environments that did not come back to
            what they showed (a simulator that is not deterministic, or other settings). They have
            begun their next episode.
        """

    @abstractmethod
    def send(self, actions: Tensor, next_seeds: Sequence[int]) -> None:
        """Starts one step; an environment whose episode ends resets itself to its next seed.

        Args:
            actions: [N, A] in [-1, 1].
            next_seeds: per environment, the seed of the episode after the present one.
        """

    @abstractmethod
    def recv(self) -> StepResult:
        """Waits for the step that `send` started; `restarted` says which environments were lost."""

    @abstractmethod
    def render(self, env: int) -> np.ndarray | None:
        """Returns a uint8 frame [height, width, 3], or None if the environment was lost at that."""

    def pop_warnings(self) -> list[str]:
        """One line for each environment restarted since the last call."""
        return []

    @abstractmethod
    def close(self) -> None:
        """Ends the environments; harmless when called twice."""


class Trainable(Protocol):
    """A group of parameters with its optimiser, as an engine sees it."""

    parameters: list[nn.Parameter]

    @property
    def learning_rate(self) -> float:
        """The present learning rate."""
        ...


class UpdateEngine(ABC):
    """Backward, average over ranks, clip and step, for one module's own parameters."""

    @abstractmethod
    def attach(self, name: str, parameters: Iterable[nn.Parameter], config: Any) -> Trainable:
        """Builds an optimiser over `parameters` as `config` (an OptimConfig) says."""

    @abstractmethod
    def step(self, trainable: Trainable, loss: Tensor) -> Tensor:
        """Takes one optimiser step on `loss`; returns the gradient norm before clipping."""

    @abstractmethod
    def set_progress(self, progress: float) -> None:
        """Moves every learning-rate schedule to the share of the run that is over."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Optimiser moments by trainable."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores optimiser moments."""
