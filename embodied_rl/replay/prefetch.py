"""Batches prepared in the background while the learner computes."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Generic, TypeVar

from embodied_rl.errors import UserError

Item = TypeVar("Item")
TIMEOUT = 120.0  # seconds: a disk that takes longer for one batch is not coming back


class Prefetcher(Generic[Item]):
    """Runs jobs ahead on one thread; errors and hangs surface in `take`.

    The thread is a daemon, so that a read that never returns cannot keep the process alive.

    Args:
        depth: jobs ahead.
        timeout: seconds to wait for a job before giving up.
    """

    def __init__(self, depth: int, timeout: float = TIMEOUT) -> None:
        self.depth, self.timeout = depth, timeout
        self._ahead: deque[Future[Item]] = deque()
        self._queue: queue.SimpleQueue[tuple[Future[Item], Callable[[], Item]]]
        self._queue = queue.SimpleQueue()
        threading.Thread(target=_work, args=(self._queue,), daemon=True).start()

    def take(self, plan: Callable[[], Callable[[], Item]]) -> Item:
        """Returns the next batch, and puts `depth` more on their way.

        Args:
            plan: decides, at once and in the caller, what a job will read; returns the job.

        Raises:
            Exception: whatever the job raised.
            UserError: it did not end in time.
        """
        while len(self._ahead) <= self.depth:
            future: Future[Item] = Future()
            self._queue.put((future, plan()))
            self._ahead.append(future)
        return self._wait(self._ahead.popleft())

    def settle(self) -> None:
        """Waits for the jobs on their way, whatever their outcome."""
        wait(list(self._ahead), self.timeout)

    def drop(self) -> None:
        """Forgets what was prepared, errors included, once the job that runs has ended."""
        jobs, self._ahead = list(self._ahead), deque()
        running = [job for job in jobs if not job.cancel()]
        wait(running, self.timeout)

    def _wait(self, job: Future[Item]) -> Item:
        try:
            return job.result(self.timeout)
        except FutureTimeout:
            raise UserError(
                f"reading a batch from replay took more than {self.timeout:.0f} s. Is the disk "
                "still there? Once it is, continue with resume=<run folder>."
            ) from None


def _work(jobs: queue.SimpleQueue[tuple[Future[Item], Callable[[], Item]]]) -> None:
    while True:
        future, job = jobs.get()
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(job())
        except BaseException as error:  # raised again where the batch is taken
            future.set_exception(error)
