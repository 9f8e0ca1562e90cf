"""The episodes that N environments are in the middle of."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied_rl.types import Trajectory

Rows = dict[str, Tensor]  # by field; the first axis is what the function says
FLAGS = ("terminated", "truncated", "success")
FIRST = 8  # decisions that there is room for at first


class Episodes:
    """Decisions taken and rewards booked since each environment's last reset.

    Tables with a row for each decision of the present piece, so that a step costs as many
    operations for thousands of environments as for one. Counters and rewards are on the CPU.

    Args:
        num_envs: N.
        execute: environment steps that a full decision executes (h).
        home: where observations, features and actions are kept.

    Attributes:
        steps: [N] int64, environment steps since the reset.
        totals: [N] float64, undiscounted returns so far.
        onces: [N] bool, whether success held at any step so far.
        rows: [N] int64, finished decisions of the present piece.
    """

    def __init__(self, num_envs: int, execute: int, home: torch.device) -> None:
        self._execute, self._home = execute, home
        self._everyone = torch.arange(num_envs)
        self.steps, self.rows = np.zeros(num_envs, np.int64), np.zeros(num_envs, np.int64)
        self.totals, self.onces = np.zeros(num_envs), np.zeros(num_envs, np.bool_)
        self._left = np.zeros(num_envs, np.int64)  # actions of the plan still to execute
        self._plan: Tensor | None = None  # [N, h, A]
        self._capacity = FIRST
        self._decisions: Rows = {}  # [N, capacity, ...]
        self._outcomes: Rows = {  # the same, of what followed
            "reward": torch.zeros(num_envs, FIRST, execute),
            "steps": torch.zeros(num_envs, FIRST, dtype=torch.int64),
            **{name: torch.zeros(num_envs, FIRST, dtype=torch.bool) for name in FLAGS},
        }

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def undecided(self) -> np.ndarray:
        """[N] bool, whether an environment's next step needs a new decision."""
        return self._left == 0

    def decide(self, envs: np.ndarray, chosen: Rows, plan: Tensor) -> None:
        """Begins decisions.

        Args:
            envs: [n] which environments decide.
            chosen: [n, ...] what they observed, and `action`.
            plan: [n, h, A] the actions to execute.
        """
        self._reserve(int(self.rows[envs].max()) + 2)  # one more for the observation at the end
        self._write(envs, chosen)
        if self._plan is None:
            shape = (len(self), *plan.shape[1:])
            self._plan = torch.zeros(shape, dtype=plan.dtype, device=self._home)
        self._plan.index_put_((torch.from_numpy(envs),), plan.to(self._home))
        self._left[envs] = self._execute
        self._outcomes["reward"].numpy()[envs, self.rows[envs]] = 0

    def next_actions(self) -> Tensor:
        """Takes the actions [N, A] of the next step out of the plans."""
        assert self._plan is not None
        at = torch.from_numpy(self._execute - self._left)
        self._left -= 1
        return self._plan[self._everyone, at]

    def book(self, envs: np.ndarray, reward: np.ndarray, success: np.ndarray) -> None:
        """Counts one executed step of some environments; reward and success are [n]."""
        self.steps[envs] += 1
        at = self._execute - self._left[envs] - 1
        self._outcomes["reward"].numpy()[envs, self.rows[envs], at] = reward
        self.totals[envs] += reward
        self.onces[envs] |= success

    def finish_decisions(self, envs: np.ndarray, flags: dict[str, np.ndarray]) -> None:
        """Ends decisions with the step that used them up or ended the episode; flags are [n]."""
        rows = self.rows[envs]
        self._outcomes["steps"].numpy()[envs, rows] = self._execute - self._left[envs]
        for name, value in flags.items():
            self._outcomes[name].numpy()[envs, rows] = value
        self._left[envs] = 0
        self.rows[envs] += 1

    def close(self, envs: np.ndarray, last: Rows) -> list[Trajectory]:
        """Takes pieces out: their rows and `last` [n, ...], the observations that follow them."""
        self._reserve(int(self.rows[envs].max()) + 1)
        action = self._decisions["action"]
        self._write(envs, {**last, "action": action.new_zeros(len(envs), *action.shape[2:])})
        pieces = []
        for env, length in zip(envs.tolist(), self.rows[envs].tolist(), strict=True):
            outcomes = {k: v[env, : length + 1].clone() for k, v in self._outcomes.items()}
            for value in outcomes.values():
                value[length] = 0
            fields = {k: v[env, : length + 1].clone() for k, v in self._decisions.items()}
            pieces.append(Trajectory(fields | outcomes))
        self.rows[envs] = 0
        return pieces

    def restart(self, env: int) -> None:
        """Begins an environment's next episode; what is left of the present one is dropped."""
        self.steps[env] = self.rows[env] = self._left[env] = 0
        self.totals[env], self.onces[env] = 0.0, False

    def _write(self, envs: np.ndarray, rows: Rows) -> None:
        """Writes to each environment's row after its finished ones."""
        at = torch.from_numpy(envs), torch.from_numpy(self.rows[envs])
        for name, value in rows.items():
            if name not in self._decisions:
                shape = (len(self), self._capacity, *value.shape[1:])
                self._decisions[name] = torch.zeros(shape, dtype=value.dtype, device=self._home)
            self._decisions[name].index_put_(at, value.to(self._home))

    def _reserve(self, rows: int) -> None:
        """Makes room for so many rows."""
        if rows <= self._capacity:
            return
        self._capacity = max(rows, 2 * self._capacity)
        for table in (self._decisions, self._outcomes):
            for name, value in table.items():
                table[name] = value.new_zeros(len(self), self._capacity, *value.shape[2:])
                table[name][:, : value.shape[1]] = value

    def state_dict(self) -> list[dict[str, Any]]:
        """Everything, by environment, so that they can be dealt to other processes."""
        return [self._state(env) for env in range(len(self))]

    def _state(self, env: int) -> dict[str, Any]:
        rows, left = int(self.rows[env]), int(self._left[env])
        done = {**self._decisions, **self._outcomes} if rows else {}
        state = {
            "rows": {k: v[env, :rows].clone() for k, v in done.items()},
            "decision": None,
            "plan": None,
            "rewards": [],
            "steps": int(self.steps[env]),
            "total": float(self.totals[env]),
            "once": bool(self.onces[env]),
        }
        if left:
            assert self._plan is not None
            state["decision"] = {k: v[env, rows].clone() for k, v in self._decisions.items()}
            state["plan"] = self._plan[env, -left:].clone()
            rewards = self._outcomes["reward"][env, rows, : self._execute - left]
            state["rewards"] = rewards.tolist()
        return state

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Restores what `state_dict` returned."""
        for env, saved in enumerate(state):
            self.restart(env)
            self._load(np.array([env]), saved)

    def _load(self, env: np.ndarray, saved: dict[str, Any]) -> None:
        rows, decision = saved["rows"], saved["decision"]
        count = len(next(iter(rows.values()), ()))
        self._reserve(count + 1)
        for name, table in self._outcomes.items():
            if count:
                table[env, :count] = rows[name]
        decided = {k: v for k, v in rows.items() if k not in self._outcomes}
        for row, fields in enumerate(zip(*decided.values(), strict=True)):
            self.rows[env] = row
            self._write(env, {k: v[None] for k, v in zip(decided, fields, strict=True)})
        self.rows[env] = count
        if decision is not None:
            left, taken = saved["plan"], len(saved["rewards"])
            plan = torch.cat([left.new_zeros(taken, *left.shape[1:]), left])
            self.decide(env, {k: v[None] for k, v in decision.items()}, plan[None])
            self._outcomes["reward"][env, count, :taken] = torch.tensor(saved["rewards"])
            self._left[env] -= taken
        self.steps[env], self.totals[env] = saved["steps"], saved["total"]
        self.onces[env] = saved["once"]
