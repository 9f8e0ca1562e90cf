"""The collecting process: a collector that obeys the learner, which is another process."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
import traceback
from collections import deque
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embodied_rl import builders
from embodied_rl.channel import HANDLE, Channel
from embodied_rl.collector import Collector
from embodied_rl.config import Config
from embodied_rl.distributed import Ranks
from embodied_rl.envs.host import spec_to_json
from embodied_rl.errors import RunStopped, UserError
from embodied_rl.generators import Generators
from embodied_rl.guard import Guard
from embodied_rl.interfaces import VecEnv
from embodied_rl.shared_weights import SharedWeights
from embodied_rl.types import Trajectory

LOST = 1  # exit code where there is nobody left to tell


def collect(
    pipe: Connection, config: Config, device: str, seed: int, rank: int, world: int, failure: str
) -> None:
    """What the process does from its start to its end.

    Args:
        pipe: to the learner. When it closes, this process ends, and its simulators with it.
        config: one process's share of the run's.
        device: where the policy lives.
        seed: of the run.
        rank: of the learner among those of the run.
        world: how many learners there are.
        failure: folder where the guard saves broken numbers.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group, meant for the learner
        signal.signal(number, signal.SIG_IGN)
    assert config.train.threads is not None, "cores.settle"
    torch.set_num_threads(config.train.threads)
    inbox, outbox = Inbox(Channel(pipe)), Outbox(Channel(pipe))
    env = None
    try:
        torch.manual_seed(seed)  # as the command line does for every process of the run
        place = torch.device(device)
        env = builders.build_env(config.env, config.env.num_envs, place)
        outbox.put({"spec": spec_to_json(env.spec)})
        ranks = Ranks()
        ranks.rank, ranks.world = rank, world
        guard = Guard(Path(failure), enabled=config.train.guard)
        Service(config, env, place, seed, ranks, guard).obey(inbox, outbox)
    except RunStopped as error:
        outbox.confess(str(error), "stopped")
    except UserError as error:
        outbox.confess(str(error), "user")
    except Exception:
        outbox.confess(traceback.format_exc(), "other")
    if env is not None:
        env.close()
    os._exit(0)  # skips the simulators' exit handlers, which can hang


class Inbox:
    """What the learner says, read by a thread, so that its end is noticed at once.

    Args:
        channel: to the learner.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._commands: deque[dict[str, Any]] = deque()
        self._granted = 0  # steps since the start that may be taken
        self._saved: set[int] = set()  # those of them after which a checkpoint follows
        self._changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                with self._changed:
                    if message["do"] == "grant":
                        self._granted = message["steps"]
                        self._saved |= set(message["saved"])
                    else:
                        self._commands.append(message)
                    self._changed.notify()
        except Exception as error:  # the workers' pipes close with this process
            if not isinstance(error, (EOFError, OSError)):  # a lost learner needs no words
                traceback.print_exc()
            os._exit(LOST)

    def wait(self, taken: int) -> dict[str, Any] | None:
        """Waits for a command, or until step number `taken` is granted: then None."""
        with self._changed:
            self._changed.wait_for(lambda: self._commands or taken < self._granted)
            return self._commands.popleft() if self._commands else None

    def saved(self, taken: int) -> bool:
        """Whether a checkpoint follows after so many steps."""
        with self._changed:
            found = taken in self._saved
            self._saved.discard(taken)
            return found


class Outbox:
    """What the learner is told, sent by a thread: collecting goes on while the learner is busy.

    Args:
        channel: to the learner.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._queue: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._send, daemon=True).start()

    def _send(self) -> None:
        try:
            while True:
                self._channel.send(self._queue.get())
                self._queue.task_done()
        except Exception as error:
            if not isinstance(error, OSError):
                traceback.print_exc()
            os._exit(LOST)

    def put(self, message: dict[str, Any]) -> None:
        """Sends a message some time soon, in order."""
        self._queue.put(message)

    def confess(self, error: str, kind: str) -> None:
        """Sends why this process ends, and waits until the learner has it."""
        self.put({"error": error, "kind": kind})
        self._queue.join()


class Sink:
    """Keeps finished trajectories until they are sent."""

    def __init__(self) -> None:
        self.trajectories: list[Trajectory] = []

    def add(self, trajectory: Trajectory) -> None:
        """Takes one."""
        self.trajectories.append(trajectory)

    def pop(self) -> list[dict[str, Any]]:
        """The fields of those since the last call."""
        taken, self.trajectories = self.trajectories, []
        return [trajectory.fields for trajectory in taken]


class Service:
    """Environments, policy and collector, and what the learner may ask of them.

    Args:
        config: one process's share of the run's.
        env: the training environments.
        device: where the policy lives.
        seed: of the run.
        ranks: which learner this one collects for.
        guard: checks observations, rewards and actions.
    """

    def __init__(
        self,
        config: Config,
        env: VecEnv,
        device: torch.device,
        seed: int,
        ranks: Ranks,
        guard: Guard,
    ) -> None:
        self.env, self.seed, self.ranks = env, seed, ranks
        self.policy = builders.build_policy(config, env.spec, device)
        builders.add_judge(config, self.policy, builders.build_q_head(config, self.policy, device))
        self.sink = Sink()
        self.collector = Collector(
            env,
            self.policy,
            self.sink,
            config.rollout,
            guard,
            store_features=config.policy.cache_features,
            seed=seed,
            device=device,
            ranks=ranks,
        )
        self.generators = Generators()
        self._weights: SharedWeights | None = None
        self._version = 0  # of the weights that decided last
        self._noise_restored = False
        self._reported = time.monotonic()

    def obey(self, inbox: Inbox, outbox: Outbox) -> None:
        """Steps where it may, and answers commands, until it is told to close."""
        taken = 0
        while True:
            asked = time.monotonic()
            command = inbox.wait(taken)
            if command is None:
                waited = time.monotonic() - asked
                taken += 1
                report = self._step() | {"waited": waited, "seconds": self._since_report()}
                if inbox.saved(taken):
                    report["state"] = self._state()
                outbox.put(report)
            elif command["do"] == "close":
                return
            else:
                outbox.put(getattr(self, f"_{command['do']}")(command))

    def _since_report(self) -> float:
        before, self._reported = self._reported, time.monotonic()
        return self._reported - before

    def _step(self) -> dict[str, Any]:
        """Takes one step; returns what it brought."""
        deciding = len(self.collector.deciding)
        if deciding:
            assert self._weights is not None, "no weights were published"
            self._version = self._weights.load()
        self.collector.begin()
        self.collector.end()
        return {
            "decisions": deciding,
            "version": self._version,
            "trajectories": self.sink.pop(),
            "stats": vars(self.collector.pop_stats()),
            "dropped": self.collector.dropped,
            "warnings": self.env.pop_warnings(),
        }

    def _weigh(self, command: dict[str, Any]) -> dict[str, Any]:
        """Takes the learner's weights from where it publishes them.

        Raises:
            UserError: it has another policy.
        """
        weights = SharedWeights(self.policy, command[HANDLE])
        told = command["fingerprint"]
        if weights.layout != command["layout"] or (
            told is not None and told != self.policy.backbone.fingerprint()
        ):
            raise UserError(
                "the collecting process loaded another policy than the learner. Does something "
                "write to the folder that policy.path names?"
            )
        self._weights = weights
        return {"ok": True}

    def _load(self, command: dict[str, Any]) -> dict[str, Any]:
        """Takes the state of a checkpoint; `start` goes on from it."""
        state = command["state"]
        generators = state.pop("generators", None)  # none: written by a run that collects itself
        self._noise_restored = generators is not None
        if generators is not None:
            self.generators.load_state_dict(generators)
        self.collector.load_state_dict({**state, "recent": []})
        return {"ok": True}

    def _start(self, command: dict[str, Any]) -> dict[str, Any]:
        """Starts the first episodes, or goes on with those of a checkpoint."""
        del command
        if not self._noise_restored:  # else noise of its own, other than the learner's
            words = [self.seed, self.ranks.world, self.ranks.rank, self.collector.env_steps, 1]
            torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))
        different = self.collector.start()
        self._reported = time.monotonic()
        return {"different": different, "dropped": self.collector.dropped}

    def _tell(self, command: dict[str, Any]) -> dict[str, Any]:
        """The present state."""
        del command
        return {"state": self._state()}

    def _state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this process; the learner has the latest trajectories."""
        state = {**self.collector.state_dict(), "recent": []}
        return {**state, "generators": self.generators.state_dict()}
