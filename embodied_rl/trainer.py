"""The collect / update / evaluate / save loop."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from embodied_rl import builders
from embodied_rl.checkpoint import BEST, POLICY, Checkpoints, TorchRandom
from embodied_rl.collector import Collector
from embodied_rl.config import Config
from embodied_rl.diagnostics import Diagnostics
from embodied_rl.evaluator import Evaluation, Evaluator
from embodied_rl.interfaces import VecEnv
from embodied_rl.metrics import Logger, Means, plot_curve
from embodied_rl.policy import Policy
from embodied_rl.stopping import StopRequest
from embodied_rl.types import Batch


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


class Trainer:
    """Finetunes one policy in one environment.

    Args:
        config: the run's config.
        run_dir: an existing run folder.
        env: training environments.
        policy: backbone and actor; what is evaluated and saved is its average over updates.
        device: where networks live.
        stop: asked after every iteration.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        env: VecEnv,
        policy: Policy,
        device: torch.device,
        stop: StopRequest,
    ) -> None:
        self.config, self.run_dir, self.env, self.policy = config, run_dir, env, policy
        self.device, self.stop = device, stop
        q_head = builders.build_q_head(config, policy, device)
        self.sac = builders.build_sac(config, policy, q_head, device)
        self.averaged = policy.with_actor(self.sac.average.module)
        self.replay = builders.build_replay(config, policy, run_dir / "replay", device)
        self.collector = Collector(
            env,
            policy,
            self.replay,
            config.rollout,
            store_features=config.policy.cache_features,
            seed=config.seed,
            device=device,
        )
        self.diagnostics = Diagnostics(
            self.sac, config.algorithm, builders.build_encoder(policy, device), device
        )
        self._batch: Batch | None = None  # the latest one
        self.progress = Progress()
        self.means = Means()
        self._clock = Clock()
        self._improved = False
        self._eval_env: VecEnv | None = None
        self.checkpoints = Checkpoints(
            run_dir / "checkpoints",
            {
                "sac": self.sac,
                "replay": self.replay,
                "collector": self.collector,
                "progress": self.progress,
                "torch": TorchRandom(),
            },
            config.train.keep_checkpoints,
        )

    @property
    def step(self) -> int:
        """Environment steps so far."""
        return self.collector.env_steps

    def run(self, *, resume: bool) -> dict[str, Any] | None:
        """Trains to the end; returns the results, or None if it was stopped (and saved) before."""
        if resume:
            self.checkpoints.restore()
        self.logger = Logger(self.run_dir, self.config.train.total_steps, self.step)
        self._opened = time.monotonic() - self.progress.seconds
        for problem in self.replay.problems:
            self.logger.say(f"warning: replay: {problem}")
        try:
            if not resume:
                self._evaluate(video=self.run_dir / "videos" / "first.mp4")
                self._save()
            self._train()
            if self.stop.requested:
                self._save()
                return None
            return self._finish()
        finally:
            self.logger.close()
            if self._eval_env is not None:
                self._eval_env.close()

    def _train(self) -> None:
        train, interval = self.config.train, self.config.eval.interval
        self.collector.start()
        while self.step < train.total_steps and not self.stop.requested:
            before = self.step

            def crossed(every: int, before: int = before) -> bool:
                return every > 0 and self.step // every > before // every

            self._iterate()
            done = self.step >= train.total_steps
            if crossed(train.log_interval) or done:
                self._log()
            evaluated = crossed(interval) or done
            if evaluated:
                self._evaluate()
            if evaluated or crossed(train.checkpoint_interval):
                self._save()
            score = self.progress.last_eval[self.config.eval.metric]
            if evaluated and train.stop_at is not None and score >= train.stop_at:
                self.logger.say(f"{self.config.eval.metric} reached {score:.3g}: stopping early")
                break

    def _iterate(self) -> None:
        """Steps every environment `rollout.steps` times, with `update_epoch` updates in between.

        Updates run while the workers simulate; they see the replay as it was before that step.
        """
        steps, updates = self.config.rollout.steps, self.config.algorithm.update_epoch
        started = time.monotonic()
        for s in range(steps):
            self.collector.begin()
            if self.replay.ready:
                for _ in range((s + 1) * updates // steps - s * updates // steps):
                    self._update()
            self.collector.end()
        self._clock.add(steps * self.env.num_envs, time.monotonic() - started)

    def _update(self) -> None:
        self.sac.engine.set_progress(self.step / self.config.train.total_steps)
        self._batch = self.replay.sample(self.config.algorithm.batch_size)
        self.means.add(self.sac.update(self._batch, env_steps=self.step))
        self.progress.updates += 1
        self._clock.updates += 1

    def _log(self) -> None:
        """Records what happened since the last record."""
        episodes = self.collector.pop_stats().summary()
        rates = self._clock.pop()
        values = {f"train/{k}": v for k, v in episodes.items()}
        values |= {f"speed/{k}": v for k, v in rates.items()}
        values["train/updates"] = float(self.progress.updates)
        values |= self.means.pop()
        if self._batch is not None and self.config.train.diagnostics:
            values |= self.diagnostics.measure(self._batch, self.collector.recent)
        self.logger.write(self.step, values)
        warning = self.diagnostics.warning(values) if self.config.train.diagnostics else None
        if warning is not None:
            self.logger.say(warning)
        shown = {"steps/s": f"{rates['steps_per_s']:.0f}", "upd/s": f"{rates['updates_per_s']:.0f}"}
        if episodes:
            shown["rollout"] = f"{episodes['success_once']:.0%}"
            shown["return"] = f"{episodes['return']:.1f}"
        self.logger.show(self.step, **shown)

    def _evaluate(self, video: Path | None = None) -> None:
        """Scores the policy on the learning curve's seeds."""
        summary = self._score(self.averaged, self.config.eval.seed, video).summary
        score = summary[self.config.eval.metric]
        self.logger.write(self.step, {f"eval/{k}": v for k, v in summary.items()})
        self.logger.show(self.step, success=f"{summary['success_once']:.0%}")
        best = self.progress.best_score
        self._improved = best is None or score >= best
        if self._improved:
            self.progress.best_score, self.progress.best_step = score, self.step
        self.logger.say(
            f"step {self.step:>7,}: success {summary['success_once']:.0%} (at end "
            f"{summary['success_at_end']:.0%}), return {summary['return']:.2f}"
            f"{'  best so far' if self._improved and best is not None else ''}"
        )
        self.progress.last_eval = summary

    def _score(self, policy: Policy, first_seed: int, video: Path | None) -> Evaluation:
        settings = self.config.eval
        if self._eval_env is None:
            self._eval_env = builders.build_env(self.config.env, settings.num_envs, self.device)
        return Evaluator(self._eval_env, settings.episodes, self.device).run(
            policy,
            first_seed,
            video=video if settings.video else None,
            video_episodes=settings.video_episodes,
        )

    def _save(self) -> None:
        self.progress.seconds = time.monotonic() - self._opened
        self.logger.sync()
        self.checkpoints.save(self.step, self.averaged, best=self._improved)
        self._improved = False

    def _finish(self) -> dict[str, Any]:
        """Compares the pretrained and the best policy on seeds that nothing has seen yet."""
        final_seed = self.config.eval.final_seed
        self.logger.say("comparing the pretrained and the best policy on held-out episodes ...")
        if self.config.policy.path is None:
            start = self.policy.with_actor(None)
        else:
            start = Policy.from_pretrained(self.config.policy.path).to(self.device)
        before = self._score(start, final_seed, None).summary
        best = Policy.from_pretrained(self.run_dir / "checkpoints" / BEST / POLICY).to(self.device)
        after = self._score(best, final_seed, self.run_dir / "videos" / "last.mp4").summary
        results = {
            "pretrained": before,
            "final": after,
            "episodes": self.config.eval.episodes,
            "first_seed": final_seed,
            "best_step": self.progress.best_step,
            "env_steps": self.step,
            "updates": self.progress.updates,
            "seconds": round(time.monotonic() - self._opened, 1),
        }
        path = self.run_dir / "results.json"
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        title = f"{self.config.env.task}, {self.config.algorithm.q_head_type}"
        plot_curve(self.run_dir, f"{title}, seed {self.config.seed}", self.config.eval.metric)
        return results
