"""N environments, as a rule in processes of their own, in lockstep; a lost one is started again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied_rl.envs.fork_server import fork_context
from embodied_rl.envs.host import FLAGS, SingleEnv, record_type, spec_from_json
from embodied_rl.envs.in_process import InProcessWorker
from embodied_rl.envs.process import Worker, WorkerLost
from embodied_rl.errors import RunStopped, UserError
from embodied_rl.interfaces import VecEnv
from embodied_rl.types import Obs, StepResult

START_TIMEOUT = 180.0  # seconds: importing a simulator on a busy machine is slow
Past = list[tuple[int, list[list[float]]]]  # seed and actions of each episode, oldest first
MAX_LOSSES, WINDOW = 3, 3600.0  # more losses than this (or N, if larger) in an hour end the run


class WorkerVecEnv(VecEnv):
    """N single environments, each in a process of its own, or all in this one.

    A process that dies, or does not answer in time, is started again. Resets and resumes are then
    repeated; an episode that it was in the middle of is lost, and `StepResult.restarted` says so.

    A simulator's state is not saved but lived through again: the seeds and actions since it was
    last rebuilt. PhysX carries a little state over a plain reset, so that the present episode alone
    would not do; rebuilding at every `rebuild_every`-th autoreset bounds what has to be repeated.

    Args:
        make: importable function that builds the environment inside the worker.
        args: its arguments (sent to the worker).
        num_envs: N.
        preload: modules that the fork server imports once, so that workers share them.
        timeout: seconds that a step or reset may take before the worker counts as hanging.
        rebuild_every: episodes between rebuilds; 1 where a reset leaves no trace anyway.
        in_process: everything in this process instead, where nothing is started again.

    Raises:
        UserError: an environment could not be built; carries the worker's message.
    """

    def __init__(
        self,
        make: Callable[..., SingleEnv],
        args: tuple[Any, ...],
        num_envs: int,
        preload: Sequence[str] = (),
        timeout: float = 300.0,
        rebuild_every: int = 1,
        in_process: bool = False,
    ) -> None:
        self.num_envs, self.timeout, self.rebuild_every = num_envs, timeout, rebuild_every
        self._start: Callable[[], Worker | InProcessWorker] = (
            partial(InProcessWorker, make, args)
            if in_process
            else partial(Worker, fork_context(preload), make, args)
        )
        self._closed = False
        self._warnings: list[str] = []
        self._losses: list[float] = []  # when
        self._homeless = [False] * num_envs  # restarted, and not in an episode yet
        self._past: list[Past] = [[] for _ in range(num_envs)]  # since the last rebuild
        self._sent: list[list[float]] = []  # actions of the present step
        self._next_seeds: list[int] = []
        self._shown: Obs = {}  # the latest observations
        self._workers: list[Worker | InProcessWorker] = []
        try:
            for _ in range(num_envs):
                self._workers.append(self._start())
            specs = [worker.answer(START_TIMEOUT) for worker in self._workers]
        except WorkerLost as lost:
            self.close()
            raise UserError(
                f"an environment worker {lost} while it started. Is the machine out of memory? "
                "Try a smaller env.num_envs, or run python -m embodied_rl.doctor."
            ) from None
        except BaseException:
            self.close()
            raise
        self.spec = spec_from_json(specs[0])
        self._record = record_type(self.spec)

    def reset(self, seeds: Sequence[int]) -> Obs:
        """Starts a new episode in every environment, each from its own seed."""
        self._past = [[(int(seed), [])] for seed in seeds]
        self._shown = self._begin(list(range(self.num_envs)))
        return self._shown

    def state_dict(self) -> dict[str, Any]:
        """Seeds and actions since each environment was last rebuilt, and what it shows now."""
        return {"past": [_pack(past) for past in self._past], "shown": self._shown}

    def resume(self, state: dict[str, Any], next_seeds: Sequence[int]) -> tuple[Obs, Tensor]:
        """Takes all steps again; a second more patience for each.

        Raises:
            UserError: the state is of environments on a GPU.
        """
        if "past" not in state:
            raise UserError(
                "the checkpoint was written with env.sim_backend=physx_cuda, whose episodes cannot "
                "be lived through again. Resume with env.sim_backend=physx_cuda, or begin a new "
                "run from the checkpoint's policy: policy.path=RUN."
            )
        self._past = [_unpack(packed) for packed in state["past"]]
        self._shown = self._begin(list(range(self.num_envs)))
        different = [i for i in range(self.num_envs) if not _same(self._shown, state["shown"], i)]
        for i in different:
            self._past[i] = [(int(next_seeds[i]), [])]
        if different:
            for key, value in self._begin(different).items():
                self._shown[key][different] = value
        restarted = torch.zeros(self.num_envs, dtype=torch.bool)
        restarted[different] = True
        return self._shown, restarted

    def _begin(self, which: list[int]) -> Obs:
        """Brings some environments to the end of their `_past`; returns their observations."""
        for i in which:
            self._workers[i].command(self._replay(i))
        records = [self._arrive(i) for i in which]
        return self._obs(np.frombuffer(b"".join(records), self._record), "obs")

    def _replay(self, i: int) -> dict[str, Any]:
        return {"do": "replay", "episodes": self._past[i]}

    def _arrive(self, i: int) -> bytes:
        """Waits for a replay, and repeats it until it is done; `_restart` bounds the attempts."""
        patience = self.timeout + sum(len(actions) for _, actions in self._past[i])
        while (record := self._take(i, patience)) is None:
            self._workers[i].command(self._replay(i))
        self._homeless[i] = False
        return record

    def send(self, actions: Tensor, next_seeds: Sequence[int]) -> None:
        """Starts one step in every worker that is in an episode."""
        self._next_seeds = [int(seed) for seed in next_seeds]
        self._sent = actions.detach().cpu().tolist()
        for i in range(self.num_envs):
            if not self._homeless[i]:
                message = {"do": "step", "action": self._sent[i], "seed": self._next_seeds[i]}
                self._workers[i].command({**message, "rebuild": self._rebuilds(i)})

    def _rebuilds(self, i: int) -> bool:
        """Whether the environment is rebuilt after its present episode."""
        return len(self._past[i]) >= self.rebuild_every

    def recv(self) -> StepResult:
        """Waits for every worker; a lost one begins its next episode."""
        records, restarted = [], torch.zeros(self.num_envs, dtype=torch.bool)
        for i, seed in enumerate(self._next_seeds):
            record = None if self._homeless[i] else self._take(i, self.timeout)
            if record is None:
                restarted[i] = True
                self._past[i] = [(seed, [])]
                self._workers[i].command(self._replay(i))
                record = self._arrive(i)
            records.append(record)
        table = np.frombuffer(b"".join(records), self._record)
        reward, terminated, truncated, success = (
            torch.from_numpy(table[name].copy()) for name in ("reward", *FLAGS)
        )
        ended, lost = (table["terminated"] | table["truncated"]).tolist(), restarted.tolist()
        for i in range(self.num_envs):
            if not lost[i]:
                self._remember(i, ended[i])
        self._shown = self._obs(table, "obs")
        final = self._obs(table, "final") if any(ended) else self._shown
        return StepResult(self._shown, reward, terminated, truncated, success, final, restarted)

    def _remember(self, i: int, ended: bool) -> None:
        self._past[i][-1][1].append(self._sent[i])
        if ended:
            kept = [] if self._rebuilds(i) else self._past[i]
            self._past[i] = [*kept, (self._next_seeds[i], [])]

    def _obs(self, table: np.ndarray, prefix: str) -> Obs:
        return {k: torch.from_numpy(table[f"{prefix}.{k}"].copy()) for k in self.spec.obs}

    def _take(self, i: int, patience: float) -> bytes | None:
        """Reads a worker's record; None after it had to be restarted."""
        try:
            self._workers[i].answer(patience)
            return self._workers[i].read()
        except WorkerLost as lost:
            self._restart(i, str(lost))
            return None

    def _restart(self, i: int, reason: str) -> None:
        """Starts a worker anew.

        Raises:
            RunStopped: it happens too often.
        """
        while True:
            now = time.monotonic()
            self._losses = [t for t in self._losses if now - t < WINDOW] + [now]
            if len(self._losses) > max(MAX_LOSSES, self.num_envs):
                raise RunStopped(
                    f"environment workers were lost {len(self._losses)} times within "
                    f"{WINDOW / 60:.0f} minutes; the last one, {i}, {reason}. Is the machine out "
                    "of memory (dmesg, free -h)? Try a smaller env.num_envs; if steps are slow, a "
                    f"larger env.worker_timeout ({self.timeout:g} s)."
                )
            self._warnings.append(f"environment worker {i} {reason}; it was started again.")
            self._homeless[i] = True
            self._workers[i].kill()
            self._workers[i] = self._start()
            try:
                self._workers[i].answer(START_TIMEOUT)
                return
            except WorkerLost as again:
                reason = str(again)

    def pop_warnings(self) -> list[str]:
        """One line for each worker restarted since the last call."""
        warnings, self._warnings = self._warnings, []
        return warnings

    def render(self, env: int) -> np.ndarray | None:
        """One frame of one environment; None if its worker was lost, drawing or before."""
        if self._homeless[env]:
            return None
        self._workers[env].command({"do": "render"})
        try:
            shape = self._workers[env].answer(self.timeout)
            return np.frombuffer(self._workers[env].read(), np.uint8).reshape(shape)
        except WorkerLost as lost:
            self._restart(env, str(lost))
            return None

    def close(self) -> None:
        """Ends the workers."""
        if self._closed:
            return
        self._closed = True
        for worker in self._workers:
            worker.close()
        for worker in self._workers:
            worker.join()


def _pack(past: Past) -> dict[str, Any]:
    """Seeds, steps per episode, and all actions [sum of steps, A] as one tensor."""
    actions = [action for _, taken in past for action in taken]
    return {
        "seeds": [seed for seed, _ in past],
        "steps": [len(taken) for _, taken in past],
        "actions": torch.tensor(actions, dtype=torch.float32) if actions else None,
    }


def _unpack(packed: dict[str, Any]) -> Past:
    actions = [] if packed["actions"] is None else packed["actions"].tolist()
    past: Past = []
    for seed, steps in zip(packed["seeds"], packed["steps"], strict=True):
        past.append((seed, actions[:steps]))
        actions = actions[steps:]
    return past


def _same(reached: Obs, recorded: Obs, env: int) -> bool:
    """Whether one environment's observations agree bit for bit."""
    return reached.keys() == recorded.keys() and all(
        torch.equal(reached[k][env], recorded[k][env]) for k in recorded
    )
