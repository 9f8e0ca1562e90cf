"""What is left of a run of two processes, taken up by as many and by another number of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from test_ranks import WORDS, finish

from embodied_rl.checkpoint import step_name
from embodied_rl.metrics import read_records
from embodied_rl.train import main

pytestmark = pytest.mark.dist
OTHER = Path("ranks") / "1_of_2"


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


def test_first_checkpoint_alone_resumes_with_another_number(run):
    """It is written before any environment begins its first episode."""
    for folder in (run, run / OTHER):
        go_back(folder, 0)
    assert main([f"resume={run}"]) == 0
    assert [r["step"] for r in read_records(run / "metrics.jsonl") if "eval/return" in r] == [0, 96]
    assert not list((run / "ranks").iterdir())
