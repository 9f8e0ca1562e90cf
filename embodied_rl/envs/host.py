"""One environment that obeys commands, in whatever process.

Commands are dictionaries that JSON can hold; an answer is JSON, and what follows some answers is
the bytes of one fixed numpy record.
"""

from __future__ import annotations

import json
from typing import Any, Protocol

import numpy as np
import torch

from embodied_rl.types import ArraySpec, EnvSpec

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


class Host:
    """Keeps one environment and the record of what it shows.

    Args:
        env: the environment.
    """

    def __init__(self, env: SingleEnv) -> None:
        self._env = env
        self._record = np.zeros((), record_type(env.spec))

    def introduce(self) -> bytes:
        """The first answer: what the environment is like."""
        return _answer(spec_to_json(self._env.spec))

    def obey(self, message: dict[str, Any]) -> list[bytes]:
        """Does what a command says; returns the answer, and a record or frame."""
        if message["do"] == "render":
            frame = self._env.render()
            return [_answer(list(frame.shape)), np.ascontiguousarray(frame).tobytes()]
        if message["do"] == "replay":
            self._replay(message["episodes"])
        else:
            self._step(message)
        return [_answer(None), self._record.tobytes()]

    def _replay(self, episodes: list[tuple[int, list[list[float]]]]) -> None:
        for number, (seed, actions) in enumerate(episodes):
            self._put("obs", self._env.reset(seed, rebuild=number == 0))
            for action in actions:
                self._put("obs", self._env.step(np.asarray(action, np.float32))[0])

    def _step(self, message: dict[str, Any]) -> None:
        obs, reward, *flags = self._env.step(np.asarray(message["action"], np.float32))
        self._record["reward"] = reward
        for name, value in zip(FLAGS, flags, strict=True):
            self._record[name] = value
        self._put("final", obs)
        if flags[0] or flags[1]:
            obs = self._env.reset(message["seed"], rebuild=message["rebuild"])
        self._put("obs", obs)

    def _put(self, prefix: str, obs: dict[str, np.ndarray]) -> None:
        for key, value in obs.items():
            self._record[f"{prefix}.{key}"] = value


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


def _answer(value: Any) -> bytes:
    return json.dumps({"ok": value}).encode()
