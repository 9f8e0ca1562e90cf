"""The evaluations of a run: its learning curve, and the comparison that closes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from embodied_rl.builders import build_env
from embodied_rl.config import Config
from embodied_rl.distributed import Ranks
from embodied_rl.evaluator import Evaluation, Evaluator
from embodied_rl.guard import Guard
from embodied_rl.interfaces import VecEnv
from embodied_rl.metrics import Logger
from embodied_rl.policy import Policy
from embodied_rl.progress import Progress
from embodied_rl.types import EnvSpec


class Examiner:
    """Scores policies on seeds that nothing is trained on, in environments of its own.

    Args:
        config: the run's, or one process's share of it.
        device: where policies run.
        ranks: processes that share the episodes.
        guard: checks the returns.
        progress: where the latest score and the best one are kept.
        logger: told about every evaluation of the learning curve.

    Attributes:
        improved: whether the latest evaluation was the best so far; whoever saves that resets it.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        ranks: Ranks,
        guard: Guard,
        progress: Progress,
        logger: Logger,
    ) -> None:
        self.config, self.device, self.ranks = config, device, ranks
        self.guard, self.progress, self.logger = guard, progress, logger
        self.improved = False
        self._env: VecEnv | None = None  # started by the first evaluation

    def examine(self, policy: Policy, step: int) -> None:
        """Scores the policy on the learning curve's seeds.

        Args:
            policy: what is evaluated.
            step: environment steps so far.
        """
        summary = self._score(policy, self.config.eval.seed, None).summary
        score = summary[self.config.eval.metric]
        self.guard.check("in an evaluation", step, {"return": torch.tensor(summary["return"])})
        self.logger.write(step, {f"eval/{k}": v for k, v in summary.items()})
        self.logger.show(step, success=f"{summary['success_once']:.0%}")
        best = self.progress.best_score
        self.improved = best is None or score >= best
        if self.improved:
            self.progress.best_score, self.progress.best_step = score, step
        self.logger.say(
            f"step {step:>7,}: success {summary['success_once']:.0%} (at end "
            f"{summary['success_at_end']:.0%}), return {summary['return']:.2f}"
            f"{'  best so far' if self.improved and best is not None else ''}"
        )
        self.progress.last_eval = summary

    def compare(self, policy: Policy, best: Path, spec: EnvSpec, videos: Path) -> dict[str, Any]:
        """Compares the pretrained and the best policy on seeds that nothing has seen yet.

        Both are filmed in the same episodes.

        Args:
            policy: the trained one; its backbone serves all of them if it did not change.
            best: policy folder of the best one.
            spec: of the environments.
            videos: folder for first.mp4 and last.mp4, if the config wants videos.

        Returns:
            The scores of both, `pretrained` and `final`, and on how many episodes from which seed.
        """
        final_seed = self.config.eval.final_seed
        same = policy.backbone if policy.backbone.frozen else None  # in memory once
        if self.config.policy.path is None:
            start = policy.with_actor(None)
        else:
            start = Policy.from_pretrained(self.config.policy.path, self.config.policy, same)
            start.backbone.check_env(spec)  # another project's folder knows no environment
            start = start.to(self.device)
        before = self._score(start, final_seed, videos / "first.mp4").summary
        trained = Policy.from_pretrained(best, self.config.policy, same)
        after = self._score(trained.to(self.device), final_seed, videos / "last.mp4").summary
        return {
            "pretrained": before,
            "final": after,
            "episodes": self.config.eval.episodes,
            "first_seed": final_seed,
        }

    def pop_warnings(self) -> list[str]:
        """One line for each environment restarted since the last call."""
        return [] if self._env is None else self._env.pop_warnings()

    def close(self) -> None:
        """Ends the environments, if any were started."""
        if self._env is not None:
            self._env.close()

    def _score(self, policy: Policy, first_seed: int, video: Path | None) -> Evaluation:
        settings = self.config.eval
        if self._env is None:
            self._env = build_env(self.config.env, settings.num_envs, self.device)
        return Evaluator(self._env, settings.episodes, self.device, self.ranks).run(
            policy,
            first_seed,
            video=video if settings.video else None,
            video_episodes=settings.video_episodes,
        )
