"""What follows which iteration of a run."""

from __future__ import annotations

from embodied_rl.config import Config


class Timetable:
    """Says what is due after an iteration that crossed a multiple of its interval, or the end.

    Args:
        config: intervals and the length of the run.
        stride: environment steps of an iteration, of all processes together.
    """

    def __init__(self, config: Config, stride: int) -> None:
        self.config, self.stride = config, stride

    def records(self, step: int) -> bool:
        """Whether a record follows the iteration that ends at `step`."""
        return self._crossed(step, self.config.train.log_interval)

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation follows the iteration that ends at `step`."""
        return self._crossed(step, self.config.eval.interval)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint follows the iteration that ends at `step`."""
        intervals = (self.config.eval.interval, self.config.train.checkpoint_interval)
        return any(self._crossed(step, every) for every in intervals)

    def _crossed(self, step: int, every: int) -> bool:
        """Whether the iteration that ended at `step` crossed a multiple of `every`, or the end."""
        before = step - self.stride
        due = every > 0 and step // every > before // every
        return due or step >= self.config.train.total_steps
