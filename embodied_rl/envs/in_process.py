"""An environment in this process, at the place of one in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from embodied_rl.envs.host import Host, SingleEnv


class InProcessWorker:
    """Obeys a command when its answer is asked for; what fails, fails here.

    Args:
        make: builds the environment.
        args: its arguments.
    """

    def __init__(self, make: Callable[..., SingleEnv], args: tuple[Any, ...]) -> None:
        self._env = make(*args)
        self._host = Host(self._env)
        self._commands: list[dict[str, Any]] = []
        self._parts = [self._host.introduce()]

    def command(self, message: dict[str, Any]) -> None:
        """Keeps the command."""
        self._commands.append(message)

    def answer(self, patience: float) -> Any:
        """Obeys it, however long it takes; returns the answer."""
        del patience
        if not self._parts:
            self._parts = self._host.obey(self._commands.pop(0))
        return json.loads(self._parts.pop(0))["ok"]

    def read(self) -> bytes:
        """Returns the bytes that follow some answers."""
        return self._parts.pop(0)

    def kill(self) -> None:
        """Frees the simulator."""
        self._env.close()

    def close(self) -> None:
        """Frees the simulator."""
        self._env.close()

    def join(self) -> None:
        """Nothing to wait for."""
