"""An environment for worker processes that dies, hangs or strays when seed or action says so."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import torch

from embodied_rl.types import ArraySpec, EnvSpec

DIE, HANG, RAISE = 0.9, -0.9, 0.8  # actions
DIES_DRAWING, STRAYS = 13, 17  # seeds
LIMIT = 5


class TinyEnv:
    """Observes [seed, step, sum of actions + trace]; five steps; the reward is the action.

    The trace is what a plain reset leaves of earlier episodes: their sum, halved at each reset.
    """

    def __init__(self, name: str, traces: bool = False) -> None:
        self._traces = traces
        self.spec = EnvSpec({"state": ArraySpec((3,), torch.float32)}, 1, LIMIT, name)
        self._state = np.zeros(3, np.float32)

    def reset(self, seed: int, *, rebuild: bool = False) -> dict[str, np.ndarray]:
        trace = 0.0 if rebuild or not self._traces else self._state[2] / 2
        self._state = np.array([seed % 10_000, 0, trace], np.float32)
        return {"state": self._state.copy()}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, bool]:
        value = float(action[0])
        if value > DIE:
            os.kill(os.getpid(), signal.SIGSEGV)
        if value < HANG:
            time.sleep(1000)
        if value > RAISE:
            raise ValueError("a mistake in the environment's own code")
        self._state += np.array([0, 1, value], np.float32)
        if self._state[0] == STRAYS:
            self._state[2] += int.from_bytes(os.urandom(3), "big") + 1
        return {"state": self._state.copy()}, value, False, self._state[1] >= LIMIT, False

    def render(self) -> np.ndarray:
        if self._state[0] == DIES_DRAWING:
            os.kill(os.getpid(), signal.SIGSEGV)
        return np.full((16, 16, 3), 7, np.uint8)

    def close(self) -> None:
        pass
