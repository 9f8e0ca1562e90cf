"""The evaluations of a run: its learning curve, and the comparison that closes it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from embodied_rl.builders import build_env
from embodied_rl.config import Config
from embodied_rl.distributed import Ranks
from embodied_rl.errors import RunStopped, UserError
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
        summary = self._score(policy, self.config.eval.seed).summary
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

    def rivals(self, policy: Policy, best: Path, spec: EnvSpec) -> tuple[Policy, Policy]:
        """Loads the pretrained and the best policy.

        Args:
            policy: the trained one; its backbone serves all of them if it did not change.
            best: policy folder of the best one.
            spec: of the environments.
        """
        same = policy.backbone if policy.backbone.frozen else None  # in memory once
        if self.config.policy.path is None:
            start = policy.with_actor(None)
        else:
            start = Policy.from_pretrained(self.config.policy.path, self.config.policy, same)
            start.backbone.check_env(spec)  # another project's folder knows no environment
            start = start.to(self.device)
        return start, Policy.from_pretrained(best, self.config.policy, same).to(self.device)

    def compare(self, before: Policy, after: Policy) -> dict[str, Any]:
        """Scores both on seeds that nothing has seen yet.

        Returns:
            Their scores, `pretrained` and `final`, and on how many episodes from which seed.
        """
        seed = self.config.eval.final_seed
        return {
            "pretrained": self._score(before, seed).summary,
            "final": self._score(after, seed).summary,
            "episodes": self.config.eval.episodes,
            "first_seed": seed,
        }

    def film(self, before: Policy, after: Policy, folder: Path) -> None:
        """Writes first.mp4 and last.mp4 of the comparison's first episodes, if asked to.

        In a process of its own. Where nothing can be drawn it warns: the run's results are there.
        """
        settings = self.config.eval
        if not settings.video:
            return
        count = min(settings.video_episodes, settings.episodes)
        alone = dataclasses.replace(self.config.env, in_process=False)
        try:
            env = build_env(alone, 1, self.device)
            try:
                camera = Evaluator(env, count, self.device)
                for policy, name in ((before, "first.mp4"), (after, "last.mp4")):
                    video = folder / name
                    camera.run(policy, settings.final_seed, video=video, video_episodes=count)
            finally:
                env.close()
        except (UserError, RunStopped, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1]
            self.logger.say(f"warning: no videos (eval.video=false asks for none): {reason}")

    def pop_warnings(self) -> list[str]:
        """One line for each environment restarted since the last call."""
        return [] if self._env is None else self._env.pop_warnings()

    def close(self) -> None:
        """Ends the environments, if any were started."""
        if self._env is not None:
            self._env.close()

    def _score(self, policy: Policy, first_seed: int) -> Evaluation:
        settings = self.config.eval
        if self._env is None:
            self._env = build_env(self.config.env, settings.num_envs, self.device)
        evaluator = Evaluator(self._env, settings.episodes, self.device, self.ranks)
        return evaluator.run(policy, first_seed)
