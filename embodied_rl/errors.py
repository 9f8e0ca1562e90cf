"""Errors meant for the person at the terminal."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: names what was received, what is allowed, and the cure.

    Command lines print the message without a traceback and exit with code 2.
    """


class RunStopped(UserError):  # noqa: N818 - how a run ends, not what was typed
    """A run cannot go on: broken numbers or dying simulators. No checkpoint is written after it.

    The trainer adds which checkpoint is the last good one and how to continue from it.
    """


class ReplayNotReady(RuntimeError):  # noqa: N818 - a state, not a failure
    """The replay buffer holds fewer trajectories than `min_buffer_size`."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the closest of `choices`, or an empty string."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f" Did you mean '{found[0]}'?" if found else ""
