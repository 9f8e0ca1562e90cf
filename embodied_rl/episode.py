"""The episode that one environment is in the middle of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from embodied_rl.types import StepResult, Trajectory

Row = dict[str, Tensor]


class Episode:
    """Decisions taken and rewards booked since the last reset of one environment.

    Attributes:
        steps: environment steps since the reset.
        total: undiscounted return so far.
        once: whether success held at any step so far.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.total, self.once = 0.0, False
        self._rows: list[Row] = []  # finished decisions of the present piece
        self._decision: Row | None = None  # the one being executed
        self._plan: list[Tensor] = []  # its actions still to execute
        self._rewards: list[float] = []  # its rewards so far

    @property
    def undecided(self) -> bool:
        """Whether the next step needs a new decision."""
        return not self._plan

    @property
    def rows(self) -> int:
        """Finished decisions of the present piece."""
        return len(self._rows)

    def decide(self, row: Row, action: Tensor, plan: Tensor) -> None:
        """Begins a decision: what was observed and chosen, and the actions [h, A] to execute."""
        self._decision = {**row, "action": action}
        self._plan = list(plan)
        self._rewards = []

    def next_action(self) -> Tensor:
        """Takes the action [A] of the next step out of the plan."""
        return self._plan.pop(0)

    def book(self, reward: float, success: bool) -> None:
        """Counts one executed step."""
        self.steps += 1
        self._rewards.append(reward)
        self.total += reward
        self.once |= success

    def finish_decision(self, result: StepResult, env: int, width: int) -> None:
        """Ends the decision with the step that used it up or ended the episode.

        Args:
            result: that step.
            env: this episode's environment.
            width: steps that a full decision executes; shorter ones are padded with zero rewards.
        """
        assert self._decision is not None
        rewards = torch.zeros(width)
        rewards[: len(self._rewards)] = torch.tensor(self._rewards)
        finished = {
            "reward": rewards,
            "steps": torch.tensor(len(self._rewards)),
            "terminated": result.terminated[env].cpu(),
            "truncated": result.truncated[env].cpu(),
            "success": result.success[env].cpu(),
        }
        self._rows.append(self._decision | finished)
        self._decision, self._plan = None, []

    def close(self, last: Row) -> Trajectory:
        """Takes the piece out: its rows and `last`, the observation that follows them."""
        first = self._rows[0]
        end = {k: last[k] if k in last else torch.zeros_like(v) for k, v in first.items()}
        rows = [*self._rows, end]
        self._rows = []
        return Trajectory({k: torch.stack([r[k] for r in rows]) for k in first})

    def state_dict(self) -> dict[str, Any]:
        """Everything, rows stacked per field."""
        first = self._rows[0] if self._rows else {}
        return {
            "rows": {k: torch.stack([r[k] for r in self._rows]) for k in first},
            "decision": self._decision,
            "plan": torch.stack(self._plan) if self._plan else None,
            "steps": self.steps,
            "rewards": list(self._rewards),
            "total": self.total,
            "once": self.once,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        fields = {k: v.unbind() for k, v in state["rows"].items()}
        count = len(next(iter(fields.values()), ()))
        self._rows = [{k: v[t] for k, v in fields.items()} for t in range(count)]
        self._decision = state["decision"]
        self._plan = [] if state["plan"] is None else list(state["plan"].unbind())
        self.steps = state["steps"]
        self._rewards = list(state["rewards"])
        self.total, self.once = state["total"], state["once"]
