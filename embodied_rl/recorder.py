"""What a run records at every log interval."""

from __future__ import annotations

from embodied_rl.collector import Collector
from embodied_rl.diagnostics import Diagnostics
from embodied_rl.distributed import Ranks
from embodied_rl.metrics import Logger, Means
from embodied_rl.progress import Clock, Progress
from embodied_rl.remote_collector import RemoteCollector
from embodied_rl.types import Batch, EpisodeStats


class Recorder:
    """Gathers what happens between two records, of all processes of a run, and writes them.

    Args:
        collector: knows of episodes and of the speed of collecting.
        diagnostics: measured at every record; None: not.
        progress: number of updates.
        logger: what writes.
        ranks: processes that train together.

    Attributes:
        means: metrics of updates since the last record.
        clock: iterations and updates since then.
    """

    def __init__(
        self,
        collector: Collector | RemoteCollector,
        diagnostics: Diagnostics | None,
        progress: Progress,
        logger: Logger,
        ranks: Ranks,
    ) -> None:
        self.collector, self.diagnostics, self.progress = collector, diagnostics, progress
        self.logger, self.ranks = logger, ranks
        self.means = Means()
        self.clock = Clock()

    def record(self, batch: Batch | None) -> None:
        """Records what happened since the last record; `batch` is the latest one, if any."""
        own = vars(self.collector.pop_stats())
        episodes = EpisodeStats.merged(self.ranks.gather_json(own)).summary()
        rates = self.clock.pop()
        values = {f"train/{k}": v for k, v in episodes.items()}
        values |= {f"speed/{k}": v for k, v in {**rates, **self.collector.pop_speed()}.items()}
        values["train/updates"] = float(self.progress.updates)
        values["train/dropped_episodes"] = float(
            sum(self.ranks.gather_json(self.collector.dropped))
        )
        values |= self.means.pop()
        if batch is not None and self.diagnostics is not None:
            values |= self.diagnostics.measure(batch, self.collector.recent)
        values |= self.ranks.means({k: v for k, v in values.items() if not k.startswith("train/")})
        step = self.collector.env_steps
        self.logger.write(step, values)
        warning = None if self.diagnostics is None else self.diagnostics.warning(values)
        if warning is not None:
            self.logger.say(warning)
        shown = {"steps/s": f"{rates['steps_per_s']:.0f}", "upd/s": f"{rates['updates_per_s']:.0f}"}
        if episodes:
            shown["rollout"] = f"{episodes['success_once']:.0%}"
            shown["return"] = f"{episodes['return']:.1f}"
        self.logger.show(step, **shown)
