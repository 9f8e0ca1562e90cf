"""The process that environment workers are forked from."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

WORKER = "embodied_rl.envs.worker"


def fork_context(preload: Sequence[str]) -> ForkServerContext:
    """The context that starts workers.

    Args:
        preload: modules that the server imports once, so that workers share them; without effect
            where it runs already.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([WORKER, *preload])
    return context


def start_early(preload: Sequence[str]) -> None:
    """Starts the server, which imports for seconds, and does not wait for it.

    To be called by the main thread.
    """
    fork_context(preload)
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process to tell
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, previous)
