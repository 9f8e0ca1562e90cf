"""One environment in a process of its own, at the other end of a pipe."""

from __future__ import annotations

import gc
import json
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import torch

from embodied_rl.envs.host import Host, SingleEnv
from embodied_rl.errors import UserError

SLICE = 1.0  # seconds; a pause of the whole machine counts as one slice, not as a hang


class WorkerLost(Exception):  # noqa: N818 - an event that its owner handles
    """A worker's process ended or does not answer; the message says which."""


class Worker:
    """A process that builds one environment and obeys commands.

    Args:
        context: the multiprocessing context that starts it.
        make: importable function that builds the environment inside the process.
        args: its arguments.
    """

    def __init__(self, context: Any, make: Callable[..., SingleEnv], args: tuple[Any, ...]) -> None:
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, make, args), daemon=True)
        self.process.start()
        theirs.close()

    def command(self, message: dict[str, Any]) -> None:
        """Sends a command. That the process is gone shows when its answer is asked for."""
        try:
            self._pipe.send_bytes(json.dumps(message).encode())
        except OSError:
            return

    def answer(self, patience: float) -> Any:
        """Waits for the answer to a command.

        Args:
            patience: seconds to wait.

        Raises:
            WorkerLost: the process ended or took longer.
            UserError: the environment says what the user should mend.
            RuntimeError: the environment raised something else; with its traceback.
        """
        try:
            left = patience
            while not self._pipe.poll(min(SLICE, max(left, 0.0))):
                left -= SLICE
                if left <= 0:
                    raise WorkerLost(f"did not answer within {patience:.0f} s")
            answer = json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):  # an OSError: a reset connection, or half a message
            self._ended()
        if "error" in answer:
            raise UserError(answer["error"]) if answer["user"] else RuntimeError(answer["error"])
        return answer["ok"]

    def read(self) -> bytes:
        """Reads the raw bytes that follow some answers.

        Raises:
            WorkerLost: the process ended before.
        """
        try:
            return self._pipe.recv_bytes()
        except (EOFError, OSError):
            self._ended()

    def _ended(self) -> NoReturn:
        self.process.join(1)
        code = self.process.exitcode
        cause = " (killed, most often for want of memory)" if code == -signal.SIGKILL else ""
        raise WorkerLost(f"ended with exit code {code}{cause}") from None

    def kill(self) -> None:
        """Ends the process at once."""
        self._pipe.close()
        self.process.kill()
        self.process.join()

    def close(self) -> None:
        """Asks the process to end, which it does when its pipe does."""
        self._pipe.close()

    def join(self) -> None:
        """Waits for the end; a process that takes longer than five seconds is killed."""
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _work(pipe: Connection, make: Callable[..., SingleEnv], args: tuple[Any, ...]) -> None:
    """The worker's main loop; ends when the parent closes the pipe or dies."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group, meant for the parent
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    # ManiSkill collects garbage whenever it rebuilds a scene, and modules are most of what there is
    # to look through: 150 of a rebuild's 200 ms
    gc.freeze()
    env = None
    try:
        env = make(*args)
        host = Host(env)
        pipe.send_bytes(host.introduce())
        while True:
            for part in host.obey(json.loads(pipe.recv_bytes())):
                pipe.send_bytes(part)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except UserError as error:
        pipe.send_bytes(json.dumps({"error": str(error), "user": True}).encode())
    except Exception:
        pipe.send_bytes(json.dumps({"error": traceback.format_exc(), "user": False}).encode())
    finally:
        if env is not None:
            env.close()
        os._exit(0)  # skips the simulator's exit handlers, which can hang
