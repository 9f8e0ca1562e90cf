"""The collect / update / evaluate / save loop."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from embodied_rl import builders
from embodied_rl.checkpoint import BEST, CHECKPOINTS, LAST, POLICY, Checkpoints
from embodied_rl.collecting_process import CollectingProcess
from embodied_rl.collectors import build_collector
from embodied_rl.config import Config
from embodied_rl.diagnostics import Diagnostics
from embodied_rl.distributed import Ranks, train_command
from embodied_rl.elastic import Deal, common_steps, has_begun
from embodied_rl.errors import RunStopped
from embodied_rl.examiner import Examiner
from embodied_rl.generators import Generators
from embodied_rl.guard import FOLDER, Guard, Update
from embodied_rl.interfaces import VecEnv
from embodied_rl.metrics import Logger, write_results
from embodied_rl.policy import Policy
from embodied_rl.progress import Progress
from embodied_rl.recorder import Recorder
from embodied_rl.stopping import StopRequest
from embodied_rl.timetable import Timetable
from embodied_rl.types import Batch


class Trainer:
    """Finetunes one policy in one environment.

    Args:
        config: the run's, settled (`cores.settle`); of several processes this one's share of it
            (`distributed.share`).
        run_dir: an existing run folder; of several processes this one's own.
        env: training environments; for `rollout.asynchronous`, the process that has them.
        policy: backbone and actor; what is evaluated and saved is its average over updates.
        device: where networks live.
        stop: asked after every iteration.
        seed: of the whole run, and so of the training episodes; None: the config's.
        ranks: processes that train together, each with its own trainer.
        replay_dir: where this process's replay is; None: in the run folder.
        deal: what a resume by another number of processes begins with.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        env: VecEnv | CollectingProcess,
        policy: Policy,
        device: torch.device,
        stop: StopRequest,
        *,
        seed: int | None = None,
        ranks: Ranks | None = None,
        replay_dir: Path | None = None,
        deal: Deal | None = None,
    ) -> None:
        self.deal = deal
        self.ranks = Ranks() if ranks is None else ranks
        self.config, self.run_dir, self.env, self.policy = config, run_dir, env, policy
        self.device, self.stop = device, stop
        self.seed = config.seed if seed is None else seed
        q_head = builders.build_q_head(config, policy, device)
        self.sac = builders.build_sac(
            config, policy, q_head, device, lambda m: self.logger.say(m), self.ranks
        )
        self.averaged = policy.with_actor(self.sac.average.module)
        folder = run_dir / "replay" if replay_dir is None else replay_dir
        self.replay = builders.build_replay(config, policy, folder, device, self.noise_seed)
        self.guard = Guard(run_dir / FOLDER, enabled=config.train.guard)
        self.progress = Progress()
        stride = env.num_envs * self.ranks.world * config.rollout.steps
        self.timetable = Timetable(config, stride)
        self.collector = build_collector(
            config,
            env,
            policy,
            self.replay,
            device,
            self.seed,
            guard=self.guard,
            ranks=self.ranks,
            updates=lambda: self.progress.updates,
            saves=self.timetable.saves,
        )
        diagnostics = Diagnostics(
            self.sac, config.algorithm, builders.build_encoder(policy, device), device
        )
        self._batch: Batch | None = None  # the latest one
        self.logger = Logger(run_dir, config.train.total_steps, shown=self.ranks.rank == 0)
        self.recorder = Recorder(
            self.collector,
            diagnostics if config.train.diagnostics else None,
            self.progress,
            self.logger,
            self.ranks,
        )
        self.examiner = Examiner(config, device, self.ranks, self.guard, self.progress, self.logger)
        self.checkpoints = Checkpoints(
            run_dir / CHECKPOINTS,
            {
                "sac": self.sac,
                "replay": self.replay,
                "collector": self.collector,
                "progress": self.progress,
                "means": self.recorder.means,
                "clock": self.recorder.clock,
                "logger": self.logger,
                "diagnostics": diagnostics,
                "generators": Generators(),
                "ranks": self.ranks,
            },
            config.train.keep_checkpoints,
        )

    @property
    def step(self) -> int:
        """Environment steps so far."""
        return self.collector.env_steps

    @property
    def noise_seed(self) -> int:
        """Of what this process draws, up to its first checkpoint."""
        return self.config.seed if self.deal is None else self.deal.noise_seed

    @property
    def stopping(self) -> bool:
        """Whether some process was asked to stop."""
        return self.ranks.any(self.stop.requested)

    def run(self, *, resume: bool) -> dict[str, Any] | None:
        """Trains to the end; returns the results, or None if it was stopped (and saved) before.

        Raises:
            RunStopped: broken numbers, or simulators that keep dying; names the last checkpoint.
            UserError: some processes do not find their checkpoints.
        """
        begun = self.deal is not None or (
            resume and has_begun(self.checkpoints, self._whole_run, self.ranks)
        )
        if self.deal is not None:
            self.deal.hand_over(self.checkpoints, self.replay)
        elif begun:
            self.checkpoints.restore(common_steps(self.checkpoints, self.ranks))
            if self.ranks.any(self.checkpoints.best is None):  # damaged: the next one is the best
                self.progress.best_score = None
        self.logger.open(self.step)
        self._opened = time.monotonic() - self.progress.seconds
        if self.deal is not None:
            self._save()
            if self.ranks.rank == 0:
                self.deal.clear()
        if resume and not begun:
            self.logger.say("the run ended before its first checkpoint: it begins anew")
        for problem in [
            *self.checkpoints.problems,
            *(f"replay: {p}" for p in self.replay.problems),
            *(f"replay: {p}" for p in (self.deal.problems if self.deal else ())),
        ]:
            self.logger.say(f"warning: {problem}")
        try:
            if not begun:
                self.examiner.examine(self.averaged, self.step)
                self._save()
            self._train()
            if self.stopping:
                self._save()
                self.ranks.meet()  # torchrun ends the others as soon as one has left
                return None
            return self._finish()
        except RunStopped as error:
            raise RunStopped(f"{error} {self._way_on()}") from error
        finally:
            self._tell_restarts()
            self.logger.close()
            self.examiner.close()
            self.replay.close()

    def _way_on(self) -> str:
        last = self.checkpoints.last
        if last is None:
            return "There is no checkpoint yet."
        return (
            f"The last good checkpoint, {last}, is intact; to continue from it: "
            f"{train_command(self.ranks.world)} resume={self._whole_run}"
        )

    @property
    def _whole_run(self) -> Path:
        """The run's folder; `run_dir` is that of this process."""
        return self.run_dir if self.ranks.rank == 0 else self.run_dir.parent.parent

    def _start(self) -> None:
        different = self.collector.start()
        if different:
            self.logger.say(
                f"warning: {different} of {self.env.num_envs} episodes in progress were dropped: "
                "the simulator, given the same seed and actions, did not come to the observation "
                "that was recorded. Their environments begin new episodes."
            )

    def _tell_restarts(self) -> None:
        for line in (*self.env.pop_warnings(), *self.examiner.pop_warnings()):
            self.logger.say(f"warning: {line}")

    def _train(self) -> None:
        train = self.config.train
        self._start()
        while self.step < train.total_steps and not (self.stopping and self.collector.settle()):
            self._iterate()
            if self.timetable.records(self.step):
                self.recorder.record(self._batch)
            evaluated = self.timetable.evaluates(self.step)
            if evaluated:
                self.examiner.examine(self.averaged, self.step)
            if self.timetable.saves(self.step):
                self._save()
            score = self.progress.last_eval[self.config.eval.metric]
            if evaluated and train.stop_at is not None and score >= train.stop_at:
                self.logger.say(f"{self.config.eval.metric} reached {score:.3g}: stopping early")
                break

    def _iterate(self) -> None:
        """Steps every environment `rollout.steps` times, with `update_epoch` updates in between.

        Updates run while the workers simulate, or after; they see the replay as it was before that
        step.
        """
        steps, updates = self.config.rollout.steps, self.config.algorithm.update_epoch
        started = time.monotonic()
        for s in range(steps):
            self.collector.begin()
            if self.config.rollout.overlap is False:
                self.collector.wait()
            if self.ranks.all(self.replay.ready):
                for _ in range((s + 1) * updates // steps - s * updates // steps):
                    self._update()
            self.collector.end()
        self.guard.verify()  # so that no log, evaluation or checkpoint comes before a check
        self._tell_restarts()
        whole = self.env.num_envs * self.ranks.world
        self.recorder.clock.add(steps * whole, time.monotonic() - started)

    def _update(self) -> None:
        self.sac.engine.set_progress(self.step / self.config.train.total_steps)
        self._batch = self.replay.sample(self.config.algorithm.batch_size)
        metrics = self.sac.update(self._batch, env_steps=self.step)
        self.progress.updates += 1
        self.recorder.clock.updates += 1
        self.guard.watch(Update(self.progress.updates, self.step, self._batch, metrics))
        self.recorder.means.add(metrics)

    def _save(self) -> None:
        self.progress.seconds = time.monotonic() - self._opened
        learner = self.sac.state_dict()  # on all processes at once: they may share out its parts
        self.guard.check_state(self.step, learner)
        if self.ranks.rank == 0:
            self.ranks.meet()  # the first one's checkpoint stands for all: it comes last
        self.checkpoints.save(
            self.step, self.averaged, best=self.examiner.improved, ready={"sac": learner}
        )
        if self.ranks.rank > 0:
            self.ranks.meet()
        self.examiner.improved = False

    def _finish(self) -> dict[str, Any]:
        """Compares the pretrained and the best policy on seeds that nothing has seen yet."""
        self.logger.say("comparing the pretrained and the best policy on held-out episodes ...")
        link = LAST if self.ranks.any(self.checkpoints.best is None) else BEST
        best = self.checkpoints.folder / link / POLICY
        rivals = self.examiner.rivals(self.policy, best, self.env.spec)
        results = {
            **self.examiner.compare(*rivals),
            "best_step": self.progress.best_step,
            "env_steps": self.step,
            "updates": self.progress.updates,
            "seconds": round(time.monotonic() - self._opened, 1),
        }
        if self.ranks.rank == 0:
            write_results(self.run_dir, results, self.config, self.seed)
            self.examiner.film(*rivals, self.run_dir / "videos")
        return results
