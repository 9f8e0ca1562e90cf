"""What the command lines share: help, threads, and errors without tracebacks."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from embodied_rl.config import EnvConfig
from embodied_rl.errors import UserError
from embodied_rl.load_config import help_text

USER_ERROR, INTERRUPTED = 2, 130


def run(command: str, schema: type[Any], main: Callable[[list[str]], int]) -> None:
    """Runs a command line and exits with its code.

    A `UserError` prints its message and exits with code 2; Ctrl-C exits with 130.
    """
    args = sys.argv[1:]
    if any(a in ("-h", "--help") for a in args):
        print(help_text(command, schema))
        sys.exit(0)
    try:
        sys.exit(main(args))
    except UserError as error:
        rank = os.environ.get("RANK")  # of several processes, the one that failed
        who = f"rank {rank}: " if rank is not None else ""
        print(f"error: {who}{error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def adopt_env(env: EnvConfig, told: Mapping[str, Any], given: Set[str]) -> None:
    """Takes over the environment settings that a policy or data was made with.

    Args:
        env: changed in place.
        told: those settings, by name.
        given: keys that the user set, which stay.
    """
    for key, value in told.items():
        if f"env.{key}" not in given:
            setattr(env, key, value)


def prepare_folder(path: Path, overwrite: bool) -> Path:
    """Returns an output folder that is empty or may be replaced.

    Raises:
        UserError: it holds files and `overwrite` is false.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"out={path} is a file. Name a folder.")
    if path.exists() and any(path.iterdir()):
        if not overwrite:
            raise UserError(f"out={path} is not empty. Name another folder or set overwrite=true.")
        shutil.rmtree(path)
    return path
