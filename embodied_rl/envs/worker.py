"""One environment per process, driven in lockstep through pipes.

Commands are JSON; observations travel as the bytes of one fixed numpy record.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from embodied_rl.errors import UserError
from embodied_rl.interfaces import VecEnv
from embodied_rl.types import ArraySpec, EnvSpec, Obs, StepResult

START_TIMEOUT = 180.0  # seconds: importing a simulator on a busy machine is slow
FLAGS = ("terminated", "truncated", "success")


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


class WorkerVecEnv(VecEnv):
    """N single environments, each in a process of its own.

    Args:
        make: importable function that builds the environment inside the worker.
        args: its arguments (sent to the worker).
        num_envs: N.
        preload: modules that the fork server imports once, so that workers share them.

    Raises:
        UserError: an environment could not be built; carries the worker's message.
    """

    def __init__(
        self,
        make: Callable[..., SingleEnv],
        args: tuple[Any, ...],
        num_envs: int,
        preload: Sequence[str] = (),
    ) -> None:
        self.num_envs = num_envs
        self._closed = False
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, *preload])
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for _ in range(num_envs):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, make, args), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        try:
            specs = [self._receive(i, START_TIMEOUT) for i in range(num_envs)]
        except BaseException:
            self.close()
            raise
        self.spec = _spec_from_json(specs[0])
        self._record = _record_type(self.spec)

    def _obs(self, records: np.ndarray, prefix: str) -> Obs:
        return {k: torch.from_numpy(records[f"{prefix}.{k}"].copy()) for k in self.spec.obs}

    def _read_records(self) -> np.ndarray:
        parts = []
        for i in range(self.num_envs):
            self._receive(i)
            parts.append(self._bytes(i))
        return np.frombuffer(b"".join(parts), self._record)

    def _command(self, i: int, **message: Any) -> None:
        try:
            self._pipes[i].send_bytes(json.dumps(message).encode())
        except (BrokenPipeError, OSError):
            self._died(i)

    def _receive(self, i: int, timeout: float | None = None) -> Any:
        try:
            if not self._pipes[i].poll(timeout):
                raise UserError(
                    f"environment worker {i} did not answer within {timeout:.0f} s. "
                    "Is the machine out of memory? Try a smaller env.num_envs."
                )
            answer = json.loads(self._pipes[i].recv_bytes())
        except (EOFError, ConnectionResetError):
            self._died(i)
        if "error" in answer:
            raise UserError(answer["error"]) if answer["user"] else RuntimeError(answer["error"])
        return answer["ok"]

    def _bytes(self, i: int) -> bytes:
        try:
            return self._pipes[i].recv_bytes()
        except (EOFError, ConnectionResetError):
            self._died(i)

    def _died(self, i: int) -> NoReturn:
        self._processes[i].join(1)
        raise RuntimeError(
            f"environment worker {i} ended (exit code {self._processes[i].exitcode}). "
            "Exit code -9 means that it was killed, most often for want of memory."
        )

    def reset(self, seeds: Sequence[int]) -> Obs:
        """Starts a new episode in every environment, each from its own seed."""
        for i, seed in enumerate(seeds):
            self._command(i, do="reset", seed=int(seed))
        return self._obs(self._read_records(), "obs")

    def send(self, actions: Tensor, next_seeds: Sequence[int]) -> None:
        """Starts one step in every worker."""
        values = actions.detach().cpu().tolist()
        for i, seed in enumerate(next_seeds):
            self._command(i, do="step", action=values[i], seed=int(seed))

    def recv(self) -> StepResult:
        """Waits for every worker."""
        records = self._read_records()
        reward, terminated, truncated, success = (
            torch.from_numpy(records[name].copy()) for name in ("reward", *FLAGS)
        )
        obs, final = self._obs(records, "obs"), self._obs(records, "final")
        return StepResult(obs, reward, terminated, truncated, success, final)

    def render(self, env: int) -> np.ndarray:
        """One frame of one environment."""
        self._command(env, do="render")
        shape = self._receive(env)
        return np.frombuffer(self._bytes(env), np.uint8).reshape(shape)

    def close(self) -> None:
        """Ends the workers."""
        if self._closed:
            return
        self._closed = True
        for pipe in self._pipes:
            pipe.close()  # a worker ends when its pipe does
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _record_type(spec: EnvSpec) -> np.dtype:
    """What a worker sends after a step or reset."""
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


def _spec_to_json(spec: EnvSpec) -> dict[str, Any]:
    obs = {k: [list(s.shape), _numpy_dtype(s.dtype).name] for k, s in spec.obs.items()}
    return {
        "obs": obs,
        "action_dim": spec.action_dim,
        "max_episode_steps": spec.max_episode_steps,
        "name": spec.name,
    }


def _spec_from_json(data: dict[str, Any]) -> EnvSpec:
    obs = {
        k: ArraySpec(tuple(shape), torch.from_numpy(np.empty(0, dtype)).dtype)
        for k, (shape, dtype) in data["obs"].items()
    }
    return EnvSpec(obs, data["action_dim"], data["max_episode_steps"], data["name"])


def _answer(pipe: Connection, value: Any) -> None:
    pipe.send_bytes(json.dumps({"ok": value}).encode())


def _work(pipe: Connection, make: Callable[..., SingleEnv], args: tuple[Any, ...]) -> None:
    """The worker's main loop; ends when the parent closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    torch.set_num_threads(1)
    env = None
    try:
        env = make(*args)
        _answer(pipe, _spec_to_json(env.spec))
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
    record = np.zeros((), _record_type(env.spec))

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
        if message["do"] == "reset":
            put("obs", env.reset(message["seed"], rebuild=True))
        else:
            obs, reward, *flags = env.step(np.asarray(message["action"], np.float32))
            record["reward"] = reward
            for name, value in zip(FLAGS, flags, strict=True):
                record[name] = value
            put("final", obs)
            put("obs", env.reset(message["seed"]) if flags[0] or flags[1] else obs)
        _answer(pipe, None)
        pipe.send_bytes(record.tobytes())
