"""Environments and replay buffers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from embodied_rl.types import Batch, EnvSpec, Obs, StepResult, Trajectory


class TrajectorySink(Protocol):
    """Takes finished trajectories: a replay buffer, or what passes them on to one."""

    def add(self, trajectory: Trajectory) -> None:
        """Takes one."""
        ...


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
    """N environments stepped together, with autoreset.

    Attributes:
        num_envs: N.
        spec: what they are like.
        device: where observations and results are, and actions are wanted.
    """

    num_envs: int
    spec: EnvSpec
    device: torch.device = torch.device("cpu")

    @abstractmethod
    def reset(self, seeds: Sequence[int]) -> Obs:
        """Starts a new episode in every environment, each from its own seed.

        What ran before leaves no trace: an evaluation starts here.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What `resume` needs to come back to where every environment is (not inside a step).

        Lists and tensors with a row for each environment, or dictionaries of such, so that a run
        can go on with its environments spread over another number of processes.
        """

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
