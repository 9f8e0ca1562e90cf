"""Tensor records that the layers pass to one another.

Sizes: B batch, H chunk length (actions per decision), A action size, D feature size,
N parallel environments, T decisions in a trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Obs = dict[str, Tensor]
INSTRUCTION = "instruction"  # observation key: index into `EnvSpec.instructions`
EXPERT = "expert_action"  # observation key and field: what the expert chose, what is imitated
PREFIX = "features."  # of stored features among a trajectory's fields


@dataclass
class Features:
    """What a backbone makes of an observation.

    Attributes:
        vector: [B, D] features that actor and critic read.
        base_action: [B, H, A] the pretrained policy's own action chunk, in [-1, 1].
        candidates: [B, N, H, A] further independent chunks of a policy that samples; None: none.
        context: what a flow backbone keeps of the observation to turn noise into chunks. There only
            while acting: it is large, and never stored.
    """

    vector: Tensor
    base_action: Tensor
    candidates: Tensor | None = None
    context: Any = None

    @classmethod
    def from_fields(cls, fields: Mapping[str, Tensor]) -> Features | None:
        """Returns the features among a trajectory's or batch's fields; None if there are none."""
        parts = {k.removeprefix(PREFIX): v for k, v in fields.items() if k.startswith(PREFIX)}
        return cls(**parts) if parts else None

    def detach(self) -> Features:
        """Returns the same features cut from the graph, without context."""
        return self.map(Tensor.detach)

    def cut(self, steps: int) -> Features:
        """Returns the features with the first `steps` actions of each chunk."""
        if steps >= self.base_action.shape[1]:
            return self
        candidates = None if self.candidates is None else self.candidates[:, :, :steps]
        return Features(self.vector, self.base_action[:, :steps], candidates, self.context)

    def tensors(self) -> dict[str, Tensor]:
        """What replay stores, by field name."""
        parts = {"vector": self.vector, "base_action": self.base_action}
        if self.candidates is not None:
            parts["candidates"] = self.candidates
        return {PREFIX + name: tensor for name, tensor in parts.items()}

    def map(self, change: Callable[[Tensor], Tensor]) -> Features:
        """Returns features whose stored tensors went through `change`, without context."""
        return Features(**{k.removeprefix(PREFIX): change(v) for k, v in self.tensors().items()})


@dataclass
class ActionSample:
    """An action chunk and its log-probability.

    Attributes:
        action: [B, H, A] in [-1, 1].
        log_prob: [B] summed over chunk and action.
        mode: [B, H, A] the action of the same policy without noise.
    """

    action: Tensor
    log_prob: Tensor
    mode: Tensor


@dataclass
class Batch:
    """Transitions as the losses read them.

    Attributes:
        features: features of the observation, leading size B.
        next_features: features of the observation that follows.
        action: [B, H, A] executed chunk.
        reward: [B] discounted sum of the chunk's (or n-step) rewards.
        discount: [B] gamma to the number of environment steps, zero where the bootstrap is cut.
        is_demo: [B] bool, rows that came from the demonstration buffer.
        obs: the observations behind `features`, where features are made anew for each batch.
    """

    features: Features
    next_features: Features
    action: Tensor
    reward: Tensor
    discount: Tensor
    is_demo: Tensor
    obs: Obs | None = None

    def __len__(self) -> int:
        return int(self.reward.shape[0])


@dataclass
class Trajectory:
    """One piece of one episode of one environment.

    Every field has T + 1 rows, so that row t + 1 is the successor of row t. The last row holds
    the final observation (and its features); its action, reward and flags are zero.

    Attributes:
        fields: name to tensor [T + 1, ...]. Always present: one `obs.<key>` per observation key,
            `action` [H, A], `reward` [h] per executed environment step, `steps` (number of
            environment steps executed by the decision), `terminated`, `truncated`, `success`.
            Optional: `features.vector`, `features.base_action`, `features.candidates`.
    """

    fields: dict[str, Tensor]

    @property
    def length(self) -> int:
        """T, the number of decisions."""
        return int(self.fields["action"].shape[0]) - 1

    @property
    def labels(self) -> Tensor:
        """What to imitate [T, A]: the expert's own choice, where recorded, or what was executed."""
        label = self.fields[EXPERT if EXPERT in self.fields else "action"]
        return label[: self.length, 0]

    @property
    def nbytes(self) -> int:
        """Bytes held by all fields."""
        return sum(t.numel() * t.element_size() for t in self.fields.values())


@dataclass
class StepResult:
    """What `VecEnv.recv` returns.

    Attributes:
        obs: observations to act on next; for an environment that ended its episode, already the
            first observation of the new one (autoreset).
        reward: [N] float.
        terminated: [N] bool, the task ended in a state with no future.
        truncated: [N] bool, the time limit cut the episode.
        success: [N] bool, the task's success condition holds after this step.
        final_obs: observations after this step before any autoreset, [N, ...]; may be `obs` itself
            where no episode ended.
        restarted: [N] bool, the environment itself was lost (its process died or hung) and is back
            in its next episode, whose first observation is in `obs`. The episode it was in is to be
            dropped: reward, flags and final_obs of such an environment mean nothing.
    """

    obs: Obs
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    success: Tensor
    final_obs: Obs
    restarted: Tensor


@dataclass(frozen=True)
class ArraySpec:
    """Shape (without the leading environment axis) and dtype of one observation entry."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class EnvSpec:
    """What a policy must know of an environment.

    Attributes:
        obs: observation key to spec.
        action_dim: A; actions are in [-1, 1].
        max_episode_steps: time limit in environment steps.
        name: the task, for messages.
        instructions: what `obs["instruction"]`, an index, stands for; empty where the environment
            gives none.
    """

    obs: Mapping[str, ArraySpec]
    action_dim: int
    max_episode_steps: int
    name: str
    instructions: tuple[str, ...] = ()


@dataclass
class EpisodeStats:
    """Finished episodes of one environment loop.

    Attributes:
        returns: undiscounted return per episode.
        success_once: whether success held at any step of the episode.
        success_at_end: whether it held at the episode's last step.
        lengths: environment steps per episode.
    """

    returns: list[float] = field(default_factory=list)
    success_once: list[bool] = field(default_factory=list)
    success_at_end: list[bool] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def add(self, total: float, once: bool, at_end: bool, length: int) -> None:
        """Appends one finished episode."""
        self.returns.append(total)
        self.success_once.append(once)
        self.success_at_end.append(at_end)
        self.lengths.append(length)

    @classmethod
    def merged(cls, parts: Iterable[Mapping[str, list[Any]]]) -> EpisodeStats:
        """The episodes of several loops, given as `vars(stats)` of each."""
        whole = cls()
        for part in parts:
            for name, values in part.items():
                getattr(whole, name).extend(values)
        return whole

    def __len__(self) -> int:
        return len(self.returns)

    def summary(self) -> dict[str, float]:
        """Means over the episodes; empty where there is none."""
        n = len(self)
        if n == 0:
            return {}
        return {
            "success_once": sum(self.success_once) / n,
            "success_at_end": sum(self.success_at_end) / n,
            "return": sum(self.returns) / n,
            "episode_length": sum(self.lengths) / n,
        }
