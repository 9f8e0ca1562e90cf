"""What is left of a run of two processes, taken up by as many and by another number of them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from test_ranks import TIMEOUT, WORDS, finish, start

from embodied_rl.checkpoint import Checkpoints, read_checkpoint, step_name
from embodied_rl.distributed import Ranks
from embodied_rl.elastic import deal, has_begun
from embodied_rl.errors import UserError
from embodied_rl.manifest import write_manifest
from embodied_rl.metrics import read_records
from embodied_rl.train import main

OTHER = Path("ranks") / "1_of_2"


class ThreadRanks(Ranks):
    """One of several threads that tell one another what processes would."""

    def __init__(self, rank: int, said: list[Any], barrier: Barrier) -> None:
        super().__init__()
        self.rank, self.world, self.said, self.barrier = rank, len(said), said, barrier

    def gather_json(self, value: Any) -> list[Any]:
        self.said[self.rank] = value
        self.barrier.wait()
        everywhere = list(self.said)
        self.barrier.wait()
        return everywhere

    def any(self, flag: bool) -> bool:
        return any(self.gather_json(flag))


def together(task: Callable[[Ranks], Any]) -> list[Any]:
    """What a task returns, or the UserError that it raises, on each of two ranks."""
    said, barrier = [None, None], Barrier(2, timeout=30)

    def attempt(rank: int) -> Any:
        try:
            return task(ThreadRanks(rank, said, barrier))
        except UserError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(attempt, range(2)))


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """The folder of a run of two processes with all its checkpoints."""
    folder = tmp_path_factory.mktemp("elastic")
    finish(folder, 2, *WORDS, "train.total_steps=96", "train.keep_checkpoints=9", "run_dir=run")
    return folder / "run"


@pytest.fixture
def run(original, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(original, tmp_path / "run", symlinks=True))


def go_back(folder: Path, step: int) -> None:
    """Deletes a process's checkpoints after a step."""
    for path in (folder / "checkpoints").glob("step_*"):
        if path.name > step_name(step):
            shutil.rmtree(path)


def go_alone(run: Path) -> None:
    """Continues a run with one process."""
    assert main([f"resume={run}", "train.total_steps=128"]) == 0


@pytest.mark.dist
def test_first_checkpoint_alone_resumes_with_another_number(run):
    """It is written before any environment begins its first episode."""
    for folder in (run, run / OTHER):
        go_back(folder, 0)
    assert main([f"resume={run}"]) == 0
    assert [r["step"] for r in read_records(run / "metrics.jsonl") if "eval/return" in r] == [0, 96]
    assert not list((run / "ranks").iterdir())


@pytest.mark.dist
def test_what_is_drawn_from_replay_begins_anew(run):
    """From seed, number of processes, rank and step, so that no former draws repeat."""
    dealt = deal(run, Ranks(), 0)
    assert dealt is not None
    go_alone(run)
    state, _ = read_checkpoint(run / "checkpoints" / step_name(96))
    assert state["replay"]["rng"] == np.random.default_rng(dealt.noise_seed).bit_generator.state


@pytest.mark.unit
@pytest.mark.parametrize(
    ("machines", "begun"),
    [
        ([[], []], False),
        ([[], [OTHER / "checkpoints/step_000000000"]], False),  # the first one saves last
        ([["checkpoints/.step_000000032.tmp"], []], False),
        ([["checkpoints/step_000000032"], [OTHER / "checkpoints/step_000000032"]], True),
        ([["checkpoints/step_000000000"], [OTHER / "checkpoints/damaged_step_000000000"]], True),
        ([["checkpoints/step_000000032"], []], [1]),
        ([[], [OTHER / "checkpoints/step_000000032"]], [0]),
        ([[OTHER / "checkpoints/step_000000032"], ["checkpoints/step_000000032"]], [0, 1]),
    ],
)
def test_what_has_begun(tmp_path, machines, begun):
    """A run that lost folders, or whose machines changed places, does not begin anew."""
    runs = [tmp_path / str(rank) for rank in range(2)]
    for run, folders in zip(runs, machines, strict=True):
        for folder in folders:
            (run / folder).mkdir(parents=True)

    def ask(ranks: Ranks) -> bool:
        own = runs[ranks.rank] / (OTHER if ranks.rank else "")
        return has_begun(Checkpoints(own / "checkpoints", {}, 2), runs[ranks.rank], ranks)

    for answer in together(ask):
        if isinstance(begun, bool):
            assert answer is begun
        else:
            assert f"ranks {begun} of 2 find no checkpoint in " in str(answer)
            assert (f"{OTHER}/checkpoints" in str(answer)) == (1 in begun)


@pytest.mark.dist
def test_a_lost_folder_is_told_and_the_rest_is_left_alone(run):
    shutil.rmtree(run / OTHER)
    record = (run / "metrics.jsonl").read_bytes()
    process = start(run.parent, 2, "resume=run", "train.total_steps=128")
    printed = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode != 0
    assert "ranks [1] of 2 find no checkpoint in run/ranks/1_of_2/checkpoints" in printed
    assert "begins anew" not in printed and (run / "metrics.jsonl").read_bytes() == record


@pytest.mark.dist
def test_best_that_one_process_has_damaged_is_given_up_by_all(run):
    """Else one would link the next evaluated policy, the other keep the former best."""
    for folder in (run / "checkpoints", run / OTHER / "checkpoints"):
        (folder / "best").unlink()
        (folder / "best").symlink_to(step_name(32))
        newest = folder / step_name(96)
        text = (newest / "state.json").read_text()
        beyond, edits = re.subn(r'\["best_score", [^]]*\]', '["best_score", 1e9]', text)
        assert edits == 1
        (newest / "state.json").write_text(beyond)
        write_manifest(newest)
    (run / OTHER / "checkpoints" / step_name(32) / "state.safetensors").write_bytes(b"")
    finish(run.parent, 2, "resume=run", "train.total_steps=128")
    best = [(folder / "checkpoints" / "best").resolve().name for folder in (run, run / OTHER)]
    assert best == [step_name(128)] * 2


@pytest.mark.dist
@pytest.mark.parametrize(
    ("kept", "told"), [(64, "has step 64 (world size 2)"), (-1, "finds none")], ids=["old", "none"]
)
def test_an_old_copy_on_another_machine_is_not_dealt(run, tmp_path, kept, told):
    """Its weights would not be those of the first process."""
    go_alone(run)
    machines = [run, Path(shutil.copytree(run, tmp_path / "copy", symlinks=True))]
    same = together(lambda ranks: deal(machines[ranks.rank], ranks, 0))
    assert [dealt.step for dealt in same] == [128, 128]
    go_back(machines[1], kept)
    for error in together(lambda ranks: deal(machines[ranks.rank], ranks, 0)):
        assert f"rank 0 has step 128 (world size 1), rank 1 {told}. To continue" in str(error)
