"""Who shows how a task is done: a scripted expert, or a policy that was finetuned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from embodied_rl.policy import Policy
from embodied_rl.types import EXPERT, Obs


class Teacher(ABC):
    """Says at every step of every environment what it would do there."""

    @abstractmethod
    def labels(self, obs: Obs, attempts: Sequence[int]) -> Tensor:
        """Returns the actions [N, A] in [-1, 1] that it wants.

        Args:
            obs: of all environments, [N, ...].
            attempts: the episode that each environment is in.
        """


class ScriptedTeacher(Teacher):
    """The expert that runs beside the simulator; see `envs.demonstrator`."""

    def labels(self, obs: Obs, attempts: Sequence[int]) -> Tensor:
        """Reads the expert's choice out of the observations."""
        del attempts
        return obs[EXPERT]


class PolicyTeacher(Teacher):
    """A policy that executes `execute_steps` actions of each of its chunks, as everywhere else.

    A label is the environment's action, whatever the adapter deals with (for `noise`, the entry of
    the decoded chunk), so that any policy can be cloned. Observations are decided on one at a time,
    with a generator of their own: what an episode is depends neither on its neighbours nor on the
    number of environments.

    Args:
        policy: backbone and, if it was finetuned, its adapter.
        device: where it runs.
        seed: of the noise, with the episode and the decision in it.
        deterministic: take the adapter's mode; false: sample.
    """

    def __init__(
        self, policy: Policy, device: torch.device, seed: int, *, deterministic: bool = True
    ) -> None:
        self._policy, self._device, self._seed = policy, device, seed
        self._deterministic = deterministic
        self._episodes: dict[int, int] = {}  # environment -> the episode that its plan is for
        self._plans: dict[int, list[Tensor]] = {}
        self._decisions: dict[int, int] = {}  # environment -> those taken in that episode

    def labels(self, obs: Obs, attempts: Sequence[int]) -> Tensor:
        """Goes on with each environment's plan, and decides anew where it is used up."""
        wanted = []
        for i, attempt in enumerate(attempts):
            if self._episodes.get(i) != attempt:
                self._episodes[i], self._plans[i], self._decisions[i] = attempt, [], 0
            if not self._plans[i]:
                one = {k: v[i : i + 1].to(self._device) for k, v in obs.items()}
                self._plans[i] = list(self._decide(one, attempt, self._decisions[i]))
                self._decisions[i] += 1
            wanted.append(self._plans[i].pop(0))
        return torch.stack(wanted)

    def _decide(self, obs: Obs, attempt: int, decision: int) -> Tensor:
        """The actions to execute, [`execute_steps`, A]."""
        words = np.random.SeedSequence([self._seed, attempt, decision]).generate_state(1)
        seed = int(words[0])
        generator = torch.Generator(self._device).manual_seed(seed)
        devices = [self._device] if self._device.type == "cuda" else []
        sampling = nullcontext() if self._deterministic else torch.random.fork_rng(devices)
        with sampling:
            if not self._deterministic:  # adapters sample from torch's default generator
                torch.manual_seed(seed)
            chunk = self._policy.act(obs, deterministic=self._deterministic, generator=generator)
        return chunk[0].float().cpu()
