"""A checkpoint of some number of processes, dealt anew to another number of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied_rl.checkpoint import (
    BEST,
    CHECKPOINTS,
    Checkpoints,
    read_checkpoint,
    step_name,
    step_of,
    undamaged,
)
from embodied_rl.collector import RECENT
from embodied_rl.distributed import Ranks
from embodied_rl.errors import UserError
from embodied_rl.interfaces import TrajectorySink
from embodied_rl.manifest import Damaged
from embodied_rl.replay.damage import LostError
from embodied_rl.replay.reader import StoreReader
from embodied_rl.types import EpisodeStats, Trajectory

RANKS, REPLAY = "ranks", "replay"


def own_folder(run_dir: Path, rank: int, world: int) -> Path:
    """Where a process keeps what is its own: its replay and, except for the first, checkpoints."""
    return run_dir if world == 1 else run_dir / RANKS / f"{rank}_of_{world}"


def deal(run_dir: Path, ranks: Ranks, seed: int) -> Deal | None:
    """Prepares a resume by another number of processes; None where it is the same or there is none.

    What an earlier attempt at this left behind is deleted.

    Raises:
        UserError: machines have different checkpoints, so that weights would differ.
    """
    folder = next(undamaged(run_dir / CHECKPOINTS), None)
    found = None if folder is None else read_checkpoint(folder)
    newest = ranks.gather_json(None if found is None else [found[0]["ranks"]["world"], found[1]])
    if newest[0] is None or newest[0][0] == ranks.world:  # a resume by as many says what is missing
        return None
    others = [rank for rank, pair in enumerate(newest) if pair != newest[0]]
    if found is None or others:
        told = ", ".join(f"rank {rank} {_describe(newest[rank])}" for rank in (0, *others))
        raise UserError(
            f"the newest checkpoint in {run_dir / CHECKPOINTS} is not the same on all machines: "
            f"{told}. To continue with {ranks.world} processes, every machine needs the whole of "
            f"{run_dir} as the run left it: copy it there, or use a shared file system."
        )
    state, step = found
    dealt = Deal(run_dir, ranks, seed, state, step)
    own = own_folder(run_dir, ranks.rank, ranks.world)
    shutil.rmtree(own / REPLAY, ignore_errors=True)
    if ranks.rank > 0:
        shutil.rmtree(own, ignore_errors=True)
    return dealt


def _describe(newest: list[int] | None) -> str:
    return "finds none" if newest is None else f"has step {newest[1]} (world size {newest[0]})"


def has_begun(checkpoints: Checkpoints, run_dir: Path, ranks: Ranks) -> bool:
    """Whether there is a checkpoint to go on from; without, the run ended before its first one.

    The first process saves last, so that its folder alone says so: others may have theirs by then.

    Raises:
        UserError: some processes do not find theirs, and to begin anew would spoil the run.
    """
    empty = ranks.gather_json(checkpoints.empty)
    elsewhere = ranks.any(_goes_further(run_dir))  # as where two machines have changed places
    lacking = [rank for rank, none in enumerate(empty) if none]
    if not lacking or (empty[0] and not elsewhere):
        return not lacking
    folders = [own_folder(run_dir, r, ranks.world) if r else run_dir for r in lacking]
    raise UserError(
        f"ranks {lacking} of {ranks.world} find no checkpoint in "
        f"{', '.join(str(folder / CHECKPOINTS) for folder in folders)}, though the run has some. "
        "Copy what is missing to the machine of its rank, or use a shared file system. Another "
        "number of processes needs these folders as well; without them, begin anew with another "
        "run_dir=."
    )


def _goes_further(run_dir: Path) -> bool:
    """Whether some process's checkpoint of after the start is on this machine."""
    found = (p for own in ("", f"{RANKS}/*/") for p in run_dir.glob(f"{own}{CHECKPOINTS}/*step_*"))
    return any(path.name[-1].isdigit() and not path.name.endswith(step_name(0)) for path in found)


def common_steps(checkpoints: Checkpoints, ranks: Ranks) -> set[int] | None:
    """Steps of the checkpoints that all processes have whole; None for a process alone.

    One that was killed while it saved may have an older newest one than the others.
    """
    if ranks.world == 1:
        return None
    everywhere = ranks.gather_json([step_of(path) for path in undamaged(checkpoints.folder)])
    return set.intersection(*(set(steps) for steps in everywhere))


class Deal:
    """What one process gets of the newest checkpoint of a run of another number of processes.

    Learner and counters are the same everywhere. Environments, in the order of all of them, and
    trajectories, in the order in which they came, are dealt out: none is lost, and nothing depends
    on what is drawn. Generators begin anew from seed, number of processes, rank and step.

    Args:
        run_dir: of the run, with all its processes' folders.
        ranks: the present processes.
        seed: of the run.
        first: the first process's checkpoint.
        step: of it.

    Raises:
        UserError: a process's checkpoint or replay is not there.
    """

    def __init__(
        self, run_dir: Path, ranks: Ranks, seed: int, first: dict[str, Any], step: int
    ) -> None:
        self.run_dir, self.ranks, self.seed, self.step = run_dir, ranks, seed, step
        self.world: int = first["ranks"]["world"]
        self.folders = [own_folder(run_dir, r, self.world) for r in range(self.world)]
        others = [self._read(r) for r in range(1, self.world)]
        self.states = [first, *others]
        self.problems: list[str] = []  # experience that could not be read

    def _read(self, rank: int) -> dict[str, Any]:
        path = self.folders[rank] / CHECKPOINTS / step_name(self.step)
        try:
            return read_checkpoint(path)[0]
        except Damaged as error:
            raise UserError(
                f"{path}, of rank {rank} of {self.world}, is missing or damaged ({error}). To "
                f"continue with {self.ranks.world} processes, bring the folders of all "
                f"{self.world} together in {self.run_dir}."
            ) from None

    def hand_over(self, checkpoints: Checkpoints, replay: TrajectorySink) -> None:
        """Lets a process begin where a run of another number of processes stopped."""
        checkpoints.adopt(self.parts(), self.run_dir)
        for trajectory in self.trajectories():
            replay.add(trajectory)
        self._hand_over_best(checkpoints.folder)

    def parts(self) -> dict[str, Any]:
        """The states of all parts but replay and generators."""
        first = self.states[0]
        kept = ("sac", "progress", "clock", "logger", "diagnostics")
        dealt = {name: first[name] for name in kept}
        names = first["means"]
        means = {
            n: torch.cat([s["means"][n] for s in self.states if n in s["means"]]) for n in names
        }
        return {**dealt, "means": means, "collector": self._collector()}

    def _collector(self) -> dict[str, Any]:
        states = [state["collector"] for state in self.states]
        leads = self.ranks.rank == 0  # counts go to the first process, which adds up all
        stats = EpisodeStats.merged([s["stats"] for s in states]) if leads else EpisodeStats()
        recent = [fields for s in states for fields in s["recent"]]
        env = [state["env"] for state in states]
        return {
            "env_steps": states[0]["env_steps"],
            "dropped": sum(s["dropped"] for s in states) if leads else 0,
            "stats": vars(stats),
            "recent": recent[self.ranks.rank :: self.ranks.world][-RECENT:],
            "numbers": self._share([s["numbers"] for s in states]),
            "episodes": self._share([s["episodes"] for s in states]),
            "env": self._share(env),
        }

    def _share(self, parts: Sequence[Any]) -> Any:
        """This process's part of what has a row for each environment, or of dictionaries of it."""
        if parts[0] is None:  # of environments: the checkpoint was written before the first episode
            return None
        if isinstance(parts[0], dict):
            return {key: self._share([part[key] for part in parts]) for key in parts[0]}
        tensors = isinstance(parts[0], Tensor)
        whole = torch.cat(list(parts)) if tensors else [row for part in parts for row in part]
        rows = len(whole) // self.ranks.world
        return whole[self.ranks.rank * rows : (self.ranks.rank + 1) * rows]

    def trajectories(self) -> Iterator[Trajectory]:
        """This process's part of the experience, oldest first."""
        position = 0
        readers = [StoreReader(folder / REPLAY) for folder in self.folders]
        spans = [span(s["replay"], r) for s, r in zip(self.states, readers, strict=True)]
        for age in range(max(map(len, spans))):
            # the newest of each shard come last together, though shards differ in length
            for reader, numbers in zip(readers, spans, strict=True):
                at = age - (max(map(len, spans)) - len(numbers))
                if at < 0 or not reader.length(numbers[at]):
                    continue
                mine = position % self.ranks.world == self.ranks.rank
                position += 1
                if mine:
                    try:
                        yield Trajectory(reader.read(numbers[at]))
                    except LostError:  # damaged: its reader tells so
                        continue
        self.problems = [problem for reader in readers for problem in reader.problems]
        for reader in readers:
            reader.close()

    @property
    def noise_seed(self) -> int:
        """Of this process's generators from here on."""
        words = [self.seed, self.ranks.world, self.ranks.rank, self.step]
        return int(np.random.SeedSequence(words).generate_state(1)[0])

    def _hand_over_best(self, folder: Path) -> None:
        """Puts the best checkpoint where this process keeps its own."""
        best = self.run_dir / CHECKPOINTS / BEST
        if self.ranks.rank == 0 or not best.exists():
            return
        source = best.resolve()
        shutil.copytree(source, folder / source.name, copy_function=os.link, dirs_exist_ok=True)
        (folder / BEST).unlink(missing_ok=True)
        (folder / BEST).symlink_to(source.name)

    def clear(self) -> None:
        """Deletes what the former processes had, once the present ones have saved it."""
        for folder in self.folders:
            shutil.rmtree(folder if self.world > 1 else folder / REPLAY)


def span(state: dict[str, Any], reader: StoreReader) -> range:
    """Numbers of the trajectories that a checkpoint knows and the disk still has."""
    online = state.get("online", state)
    return range(max(online["first"], reader.first), min(online["trajectories"], len(reader)))
