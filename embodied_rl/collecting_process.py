"""The collecting process as the learner sees it: started, spoken to, lost, ended."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from pathlib import Path
from typing import Any, NoReturn

import torch

from embodied_rl import builders
from embodied_rl.channel import Channel
from embodied_rl.collecting import collect
from embodied_rl.config import Config
from embodied_rl.distributed import Ranks, own_gpu
from embodied_rl.envs.host import spec_from_json
from embodied_rl.errors import RunStopped, UserError
from embodied_rl.guard import FOLDER
from embodied_rl.interfaces import VecEnv

PATIENCE = 10.0  # seconds for a process to end by itself
KINDS = {"stopped": RunStopped, "user": UserError}


def open_env(
    config: Config, device: torch.device, seed: int, ranks: Ranks, run_dir: Path
) -> VecEnv | CollectingProcess:
    """Builds a run's training environments, or starts the process that has them.

    Args:
        config: one process's share of the run's.
        device: of the learner.
        seed: of the run.
        ranks: this process among those of the run.
        run_dir: where this process keeps what is its own.
    """
    if not config.rollout.asynchronous:
        return builders.build_env(config.env, config.env.num_envs, device)
    place = collecting_device(config.rollout.device, device)
    return CollectingProcess(config, place, seed, ranks, run_dir / FOLDER)


def collecting_device(name: str | None, learner: torch.device) -> torch.device:
    """Where a collecting policy lives: on its learner's GPU where any would do.

    Args:
        name: `rollout.device`.
        learner: its learner's device.
    """
    if name is None or (name in ("auto", "cuda") and learner.type == "cuda"):
        return learner
    return builders.build_device(own_gpu(name), "rollout.device")


class CollectingProcess:
    """A process with environments, a policy and a collector of its own.

    It ends when this process does, however that happens: it watches the pipe between them.

    Args:
        config: one process's share of the run's.
        device: where its policy lives.
        seed: of the run.
        ranks: this process among those of the run.
        failure: folder where its guard saves broken numbers.

    Attributes:
        num_envs: environments that it steps.
        spec: of them.
        warnings: lines about them that nobody has asked for yet.

    Raises:
        UserError: an environment could not be built; carries its message.
    """

    def __init__(
        self, config: Config, device: torch.device, seed: int, ranks: Ranks, failure: Path
    ) -> None:
        self.num_envs = config.env.num_envs
        self.warnings: list[str] = []
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._channel = Channel(self._pipe)
        args = (theirs, config, str(device), seed, ranks.rank, ranks.world, str(failure))
        # not daemonic in multiprocessing's sense: those may have no workers of their own
        self._process = context.Process(target=collect, args=args, name="collector")
        self._process.start()
        theirs.close()
        atexit.register(self.close)  # before multiprocessing waits for it at the exit
        try:
            self.spec = spec_from_json(self.receive()["spec"])
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int | None:
        """Its number."""
        return self._process.pid

    def send(self, message: dict[str, Any], handle: int | None = None) -> None:
        """Sends a message. That the process is gone shows when the next one is received."""
        try:
            self._channel.send(message, handle)
        except OSError:
            return

    def ask(self, message: dict[str, Any], handle: int | None = None) -> dict[str, Any]:
        """Sends a command and waits for its answer; raises what `receive` does."""
        self.send(message, handle)
        return self.receive()

    def receive(self) -> dict[str, Any]:
        """Waits for the next message.

        Raises:
            RunStopped: the process ended, or cannot go on and says why.
            UserError: it says what the user should mend.
            RuntimeError: something else failed there; with its traceback.
        """
        try:
            message = self._channel.receive()
        except (EOFError, OSError):
            self._ended()
        if "error" in message:
            kind = KINDS.get(message["kind"])
            if kind is None:
                raise RuntimeError(f"in the collecting process:\n{message['error']}")
            raise kind(message["error"])
        return message

    def _ended(self) -> NoReturn:
        self._process.join(PATIENCE)
        code = self._process.exitcode
        cause = " (killed, most often for want of memory)" if code == -signal.SIGKILL else ""
        raise RunStopped(
            f"the collecting process (rollout.asynchronous=true, pid {self.pid}) ended with exit "
            f"code {code}{cause}."
        ) from None

    def pop_warnings(self) -> list[str]:
        """One line for each environment restarted since the last call."""
        warnings, self.warnings = self.warnings, []
        return warnings

    def close(self) -> None:
        """Ends the process with its environments; harmless when called twice."""
        atexit.unregister(self.close)
        if self._pipe.closed:
            return
        self.send({"do": "close"})
        self._process.join(PATIENCE)
        self._pipe.close()
        self._process.join(PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
