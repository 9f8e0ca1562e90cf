"""Where a run stands: counters and rates that a checkpoint keeps."""

from __future__ import annotations

from typing import Any


class Progress:
    """Counters of a run that a checkpoint keeps."""

    def __init__(self) -> None:
        self.updates = 0
        self.best_score: float | None = None
        self.best_step = 0
        self.last_eval: dict[str, float] = {}
        self.seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        """All counters."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores them."""
        vars(self).update(state)


class Clock:
    """Rates of the training loop, evaluations left out."""

    def __init__(self) -> None:
        self.steps, self.updates, self.seconds = 0, 0, 0.0

    def add(self, steps: int, seconds: float) -> None:
        """Counts one iteration."""
        self.steps += steps
        self.seconds += seconds

    def pop(self) -> dict[str, float]:
        """Returns steps and updates per second since the last call."""
        seconds = max(self.seconds, 1e-9)
        rates = {"steps_per_s": self.steps / seconds, "updates_per_s": self.updates / seconds}
        self.steps, self.updates, self.seconds = 0, 0, 0.0
        return rates

    def state_dict(self) -> dict[str, Any]:
        """All counters."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores them."""
        vars(self).update(state)
