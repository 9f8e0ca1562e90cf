"""One environment in a process of its own, at the other end of a pipe.

Commands are JSON; observations travel as the bytes of one fixed numpy record.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NoReturn, Protocol

import numpy as np
import torch

from embodied_rl.errors import UserError
from embodied_rl.types import ArraySpec, EnvSpec

FLAGS = ("terminated", "truncated", "success")
SLICE = 1.0  # seconds; a pause of the whole machine counts as one slice, not as a hang


class WorkerLost(Exception):  # noqa: N818 - an event that its owner handles
    """A worker's process ended or does not answer; the message says which."""


class SingleEnv(Protocol):
    """What a worker runs: one environment with numpy observations."""

    spec: EnvSpec

    def reset(self, seed: int, *, rebuild: bool = False) -> dict[str, np.ndarray]:
        """Starts the episode that `seed` determines.

        `rebuild` leaves nothing of earlier episodes in the simulator, so that an evaluation has
        the same outcome whatever ran before it.
        """
        ...

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, bool]:
        """Returns obs, reward, terminated, truncated, success."""
        ...

    def render(self) -> np.ndarray:
        """Returns a uint8 frame [height, width, 3]."""
        ...

    def close(self) -> None:
        """Frees the simulator."""
        ...


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


def record_type(spec: EnvSpec) -> np.dtype:
    """What a worker sends after a step, a reset or a replay."""
    obs = [(k, _numpy_dtype(s.dtype), s.shape) for k, s in spec.obs.items()]
    return np.dtype(
        [
            *((f"obs.{k}", dtype, shape) for k, dtype, shape in obs),
            *((f"final.{k}", dtype, shape) for k, dtype, shape in obs),
            ("reward", np.float32),
            *((name, np.bool_) for name in FLAGS),
        ]
    )


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    return torch.empty(0, dtype=dtype).numpy().dtype


def spec_to_json(spec: EnvSpec) -> dict[str, Any]:
    """What `spec_from_json` reads."""
    obs = {k: [list(s.shape), _numpy_dtype(s.dtype).name] for k, s in spec.obs.items()}
    return {
        "obs": obs,
        "action_dim": spec.action_dim,
        "max_episode_steps": spec.max_episode_steps,
        "name": spec.name,
        "instructions": list(spec.instructions),
    }


def spec_from_json(data: dict[str, Any]) -> EnvSpec:
    """Reads the spec that another process sends first."""
    obs = {
        k: ArraySpec(tuple(shape), torch.from_numpy(np.empty(0, dtype)).dtype)
        for k, (shape, dtype) in data["obs"].items()
    }
    limit, told = data["max_episode_steps"], tuple(data["instructions"])
    return EnvSpec(obs, data["action_dim"], limit, data["name"], told)


def _answer(pipe: Connection, value: Any) -> None:
    pipe.send_bytes(json.dumps({"ok": value}).encode())


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
        _answer(pipe, spec_to_json(env.spec))
        _serve(pipe, env)
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


def _serve(pipe: Connection, env: SingleEnv) -> None:
    record = np.zeros((), record_type(env.spec))

    def put(prefix: str, obs: dict[str, np.ndarray]) -> None:
        for key, value in obs.items():
            record[f"{prefix}.{key}"] = value

    while True:
        message = json.loads(pipe.recv_bytes())
        if message["do"] == "render":
            frame = env.render()
            _answer(pipe, list(frame.shape))
            pipe.send_bytes(np.ascontiguousarray(frame).tobytes())
            continue
        if message["do"] == "replay":
            for number, (seed, actions) in enumerate(message["episodes"]):
                put("obs", env.reset(seed, rebuild=number == 0))
                for action in actions:
                    put("obs", env.step(np.asarray(action, np.float32))[0])
        else:
            obs, reward, *flags = env.step(np.asarray(message["action"], np.float32))
            record["reward"] = reward
            for name, value in zip(FLAGS, flags, strict=True):
                record[name] = value
            put("final", obs)
            if flags[0] or flags[1]:
                obs = env.reset(message["seed"], rebuild=message["rebuild"])
            put("obs", obs)
        _answer(pipe, None)
        pipe.send_bytes(record.tobytes())
