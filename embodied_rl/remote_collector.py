"""A collector that works in another process, ahead of the learner, and is booked step by step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from embodied_rl.collecting_process import CollectingProcess
from embodied_rl.collector import RECENT, check_environments
from embodied_rl.config import Config
from embodied_rl.distributed import Ranks
from embodied_rl.interfaces import TrajectorySink
from embodied_rl.policy import Policy
from embodied_rl.shared_weights import SharedWeights
from embodied_rl.types import EpisodeStats, Trajectory


class RemoteCollector:
    """Stands where `Collector` does, for environments that another process steps.

    `end` books one step of all environments that the process has taken, waiting for it if need be:
    so each step is followed by as many updates as in a synchronous run, in the same order. The
    process may take `rollout.ahead` iterations of steps that are not booked yet. Weights are
    published at the end of each iteration, before the steps that this frees, so that those that
    decided are less than (ahead + 1) * `update_epoch` updates old when a step is booked.

    The state at a step that a checkpoint follows comes with the report of that step, while the
    process goes on.

    Args:
        process: has the environments.
        policy: whose weights are published.
        replay: receives every finished trajectory.
        config: `rollout` and the run's length.
        ranks: processes that collect beside this one's, each with as many environments.
        updates: returns how many there were so far.
        saves: whether a checkpoint follows the iteration that ends at an environment step.

    Attributes:
        env_steps: steps of all environments of all processes that were booked.
        dropped: episodes lost in progress.
        recent: the latest finished trajectories, for diagnostics.
    """

    def __init__(
        self,
        process: CollectingProcess,
        policy: Policy,
        replay: TrajectorySink,
        config: Config,
        ranks: Ranks,
        *,
        updates: Callable[[], int],
        saves: Callable[[int], bool],
    ) -> None:
        self.process, self.replay, self.ranks = process, replay, ranks
        self.steps, self.ahead = config.rollout.steps, config.rollout.ahead
        self.total = config.train.total_steps
        self._updates, self._saves = updates, saves
        self.env_steps, self.dropped = 0, 0
        self.stats = EpisodeStats()
        self.recent: deque[Trajectory] = deque(maxlen=RECENT)
        self._booked = self._granted = 0  # steps of every environment since the start
        self._settling = False
        self._saved: tuple[int, dict[str, Any]] | None = None  # steps booked, and the state then
        self._waits = Waits()
        self.weights = SharedWeights(policy)
        same = policy.backbone.fingerprint() if config.policy.cache_features else None
        told = {"do": "weigh", "layout": self.weights.layout, "fingerprint": same}
        process.ask(told, self.weights.handle)

    def start(self) -> int:
        """Starts the first episodes, or goes on with those of a checkpoint.

        Returns:
            How many of the checkpoint's episodes the simulator did not come back to.
        """
        self.weights.publish(self._updates())
        answer = self.process.ask({"do": "start"})
        self.dropped = answer["dropped"]
        self._grant()
        return answer["different"]

    def _grant(self) -> None:
        """Allows the steps up to `ahead` iterations from here, and says which to save after."""
        each = self.process.num_envs * self.ranks.world
        granted, saved = self._granted, []
        while granted < self._booked + self.ahead * self.steps and not self._settling:
            at = self.env_steps + (granted - self._booked) * each
            if granted % self.steps == 0 and at >= self.total:
                break
            granted += 1
            if granted % self.steps == 0 and self._saves(at + each):
                saved.append(granted)
        if granted > self._granted:
            self._granted = granted
            self.process.send({"do": "grant", "steps": granted, "saved": saved})

    def settle(self) -> bool:
        """Asks to stop at a point that can be saved; whether this is one."""
        self._settling = True
        return self._booked in (self._granted, self._saved and self._saved[0])

    def begin(self) -> None:
        """Starts one step: the process has done so already."""
        self._waits.begin()

    def wait(self) -> None:
        """Nothing to wait for: `validate` lets the process run beside learning alone."""

    def end(self) -> None:
        """Books the next step, waiting for it; finished episodes go to replay."""
        asked = time.monotonic()
        report = self.process.receive()
        waited = time.monotonic() - asked
        self._booked += 1
        self.env_steps += self.process.num_envs * self.ranks.world
        self.dropped = report["dropped"]
        self.stats = EpisodeStats.merged([vars(self.stats), report["stats"]])
        self.process.warnings += report["warnings"]
        for fields in report["trajectories"]:
            trajectory = Trajectory(fields)
            self.replay.add(trajectory)
            self.recent.append(trajectory)
        if "state" in report:
            self._saved = self._booked, report["state"]
        staleness = self._updates() - report["version"]
        self._waits.add(staleness, report["decisions"], waited, report["waited"], report["seconds"])
        if self._booked % self.steps == 0:
            self.weights.publish(self._updates())
        self._grant()
        self._waits.end()

    def pop_stats(self) -> EpisodeStats:
        """Returns the episodes finished since the last call."""
        stats, self.stats = self.stats, EpisodeStats()
        return stats

    def pop_speed(self) -> dict[str, float]:
        """How old the weights were, and who waited for whom, since the last call."""
        speed, self._waits = self._waits.summary(), Waits()
        oldest = max(self.ranks.gather_json(speed["staleness_max"]))
        return speed | {"staleness_max": oldest}

    def state_dict(self) -> dict[str, Any]:
        """The state of a collector, and the generators of the collecting process.

        Raises:
            RuntimeError: steps are under way, and none was to be saved here.
        """
        if self._saved is None or self._saved[0] != self._booked:
            if self._booked != self._granted:
                raise RuntimeError("no checkpoint was announced for this step")
            self._saved = self._booked, self.process.ask({"do": "tell"})["state"]
        return {
            **self._saved[1],
            "env_steps": self.env_steps,
            "dropped": self.dropped,
            "stats": vars(self.stats),
            "recent": [t.fields for t in self.recent],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, here or from a `Collector`.

        Raises:
            ValueError: the state is of another number of environments.
        """
        check_environments(state, self.process.num_envs)
        self.env_steps, self.dropped = state["env_steps"], state["dropped"]
        self.stats = EpisodeStats(**state["stats"])
        self.recent = deque((Trajectory(fields) for fields in state["recent"]), maxlen=RECENT)
        nothing = {"recent": [], "stats": vars(EpisodeStats())}
        self.process.ask({"do": "load", "state": {**state, **nothing}})


class Waits:
    """How old acting weights were, and the time that learner and collector waited, of how much."""

    def __init__(self) -> None:
        self._stale, self._decisions, self._oldest = 0, 0, 0
        self._learner, self._collector = [0.0, 0.0], [0.0, 0.0]  # waited, altogether
        self._began = 0.0

    def begin(self) -> None:
        """The learner turns to a step."""
        self._began = time.monotonic()

    def end(self) -> None:
        """The learner is through with it."""
        self._learner[1] += time.monotonic() - self._began

    def add(
        self, staleness: int, decisions: int, learner: float, collector: float, seconds: float
    ) -> None:
        """Counts a step.

        Args:
            staleness: updates that the weights were behind.
            decisions: environments that decided with them.
            learner: seconds that the learner waited for the step.
            collector: seconds that the collecting process waited before it.
            seconds: that it took, waiting included.
        """
        self._stale += staleness * decisions
        self._decisions += decisions
        self._oldest = max(self._oldest, staleness if decisions else 0)
        self._learner[0] += learner
        self._collector[0] += collector
        self._collector[1] += seconds

    def summary(self) -> dict[str, float]:
        """Means, the largest staleness, and shares of time."""

        def share(waited: float, altogether: float) -> float:
            return waited / max(altogether, 1e-9)

        return {
            "staleness": self._stale / max(self._decisions, 1),
            "staleness_max": float(self._oldest),
            "learner_waits": share(*self._learner),
            "collector_waits": share(*self._collector),
        }
