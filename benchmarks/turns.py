"""Implementations that take turns, each in a process of its own, so that noise hits all alike."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

Step = Callable[[int], None]


class Worker:
    """One implementation in its process.

    Args:
        name: what it is called.
        command: of the process, which ends up in `serve`.
        seconds: of a round, about.
        quantum: rounds are multiples of so many steps.

    Attributes:
        rates: steps per second, one for each round.
    """

    def __init__(self, name: str, command: list[str], seconds: float, quantum: int) -> None:
        self.name = name
        self.rates: list[float] = []
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._count = quantum
        while (taken := self._take(self._count)) < seconds / 2:
            self._count = quantum * max(1, round(self._count * seconds / taken / quantum))

    def _take(self, count: int) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}")
        return float(answer)

    def round(self) -> None:
        """Takes a round's steps."""
        self.rates.append(self._count / self._take(self._count))

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def by_turns(workers: list[Worker], rounds: int) -> dict[str, list[float]]:
    """Lets each take a round, again and again; ends them; returns their rates by name."""
    for _ in range(rounds):
        for worker in workers:
            worker.round()
    for worker in workers:
        worker.close()
    return {worker.name: worker.rates for worker in workers}


def serve(build: Callable[[], Step], warm_up: int) -> None:
    """A worker: reads how many steps to take from stdin, answers with the seconds.

    Args:
        build: returns the function that takes so many steps.
        warm_up: steps before the first answer: compiled, caches filled.
    """
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to stderr
    step = build()
    step(warm_up)
    for line in sys.stdin:
        started = time.perf_counter()
        step(int(line))
        answers.write(f"{time.perf_counter() - started}\n")
        answers.flush()
