"""Whole runs over several processes: `torchrun` on the fake environment, gloo, a CPU."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

from embodied_rl.checkpoint import read_checkpoint, step_of
from embodied_rl.distributed import Ranks, share
from embodied_rl.errors import UserError
from embodied_rl.metrics import read_records
from embodied_rl.replay.reader import read_all

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300
WORDS = (
    *TINY,
    "env.num_envs=4",
    "env.max_episode_steps=10",
    "algorithm.update_epoch=4",
    "rollout.steps=8",
    "eval.episodes=5",
    "eval.num_envs=2",
    "eval.interval=160",
    "train.log_interval=64",
    "train.checkpoint_interval=32",
)

SLOW_DISK = """
import os, time
from embodied_rl import checkpoint, cli, train
from embodied_rl.config import Config

if __name__ == "__main__":
    sync = checkpoint.sync
    if os.environ["RANK"] == "0":
        checkpoint.sync = lambda path: (time.sleep(0.5), sync(path))
    cli.run("train", Config, train.main)
"""


def start(folder: Path, world: int, *words: str) -> subprocess.Popen:
    """Starts a run of `world` processes in an empty folder."""
    processes = ("--standalone", f"--nproc_per_node={world}")
    return launch(folder, *processes, "-m", "embodied_rl.train", *words)


def launch(folder: Path, *words: str) -> subprocess.Popen:
    """Calls torchrun in a folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(folder: Path, world: int, *words: str) -> str:
    """Runs to the end; returns what was printed."""
    run = start(folder, world, *words)
    printed = run.communicate(timeout=TIMEOUT)[0]
    assert run.returncode == 0, printed[-3000:]
    return printed


def children(torchrun: subprocess.Popen) -> list[int]:
    """The processes that it has started, in order of rank."""
    found = subprocess.run(["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def kill_worker(run: subprocess.Popen, number: int, step: int, *folders: Path) -> None:
    """Kills one of a torchrun's processes once a run in these folders has come to a step.

    Its process number is looked up before: the run goes on meanwhile.
    """
    wait_for_step(run, 0, *folders)
    found = children(run)[number]
    wait_for_step(run, step, *folders)
    os.kill(found, signal.SIGKILL)


def wait_for_step(run: subprocess.Popen, step: int, *folders: Path) -> None:
    """Waits for a checkpoint of a step or a later one: the run deletes old ones."""
    deadline = time.monotonic() + TIMEOUT
    while not any(step_of(p) >= step for f in folders for p in f.glob("checkpoints/step_*")):
        assert run.poll() is None, run.communicate()[0][-3000:]
        assert time.monotonic() < deadline, f"no checkpoint of step {step} came"
        time.sleep(0.01)


def learner(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the learner in the newest checkpoint, by name."""
    tensors = load_file(folder / "checkpoints" / "last" / "state.safetensors")
    return {name: t for name, t in tensors.items() if "/sac/" in name}


def comparable(run: Path) -> list[dict]:
    """The records of a run without what the clock decides."""
    records = read_records(run / "metrics.jsonl")
    return [{k: v for k, v in r.items() if not k.startswith("speed/")} for r in records]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two processes: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("ranks")
    printed = finish(folder, 2, *WORDS, "train.total_steps=320", "run_dir=run")
    return folder / "run", printed


@pytest.mark.dist
def test_two_processes_are_one_run(finished):
    """Equal weights, disjoint episodes, one record of everything."""
    run, printed = finished
    assert printed.count("finetuning") == 1 and "2 processes" in printed
    first, second = learner(run), learner(run / "ranks" / "1_of_2")
    assert first and first.keys() == second.keys()
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    records = read_records(run / "metrics.jsonl")
    assert all(math.isfinite(v) for r in records for v in r.values())
    assert [r["step"] for r in records if "eval/return" in r] == [0, 160, 320]
    results = json.loads((run / "results.json").read_text())
    assert results["env_steps"] == 320 and results["episodes"] == 5
    # every share of five episodes is a multiple of .2, of either rank's alone it is not
    share_of_success = 5 * results["final"]["success_once"]
    assert share_of_success == pytest.approx(round(share_of_success))
    own = run / "ranks" / "1_of_2"
    assert (own / "replay").is_dir() and not (own / "metrics.jsonl").exists()


@pytest.mark.dist
def test_killed_rank_ends_the_run_and_resume_continues_exactly(finished, tmp_path):
    """SIGKILL of one rank; resumed, the run is the one that was never interrupted."""
    whole, _ = finished
    words = (*WORDS, "train.total_steps=320", "run_dir=run")
    run = start(tmp_path, 2, *words)
    kill_worker(run, 1, 128, tmp_path / "run")
    printed = run.communicate(timeout=TIMEOUT)[0]
    assert run.returncode != 0 and "Signal 9" in printed
    assert re.search(r"rank 1 on \S+ did not answer", printed), printed[-3000:]
    printed = finish(tmp_path, 2, "resume=run")
    assert "resuming" in printed
    assert comparable(tmp_path / "run") == comparable(whole)
    first, second = learner(tmp_path / "run"), learner(whole)
    assert all(torch.equal(t, second[name]) for name, t in first.items())


@pytest.mark.dist
@pytest.mark.parametrize("told", ["processes", "torchrun"])
def test_stopped_run_has_saved_everywhere(tmp_path, told):
    """Though the first process takes longer; torchrun, when told itself, restarts nothing."""
    script = tmp_path / "slow_disk.py"
    script.write_text(SLOW_DISK)
    restarts = "--max-restarts=2" if told == "torchrun" else "--max-restarts=0"
    words = (*WORDS, "train.total_steps=100000", "train.checkpoint_interval=100000")
    words = (*words, "eval.interval=100000", "run_dir=run", "auto_resume=true")
    command = ("--standalone", "--nproc_per_node=2", restarts, str(script), *words)
    run = launch(tmp_path, *command)
    records = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT
    while not records.exists() or '"train/updates"' not in records.read_text():
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.05)
    for pid in [run.pid] if told == "torchrun" else children(run):
        os.kill(pid, signal.SIGTERM)
    printed = run.communicate(timeout=TIMEOUT)[0]
    assert run.returncode != 0 and "finetuning" in printed and "resuming" not in printed
    folders = [tmp_path / "run", tmp_path / "run" / "ranks" / "1_of_2"]
    first, other = [(folder / "checkpoints" / "last").resolve().name for folder in folders]
    assert first == other > "step_000000000", printed[-3000:]


@pytest.mark.dist
def test_machines_that_share_nothing_and_restart(finished, tmp_path):
    """Two torchruns with folders of their own, as on two machines; one's process is killed.

    Both restart theirs, and the same command goes on: the run is that of `finished`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}"
    machines = [tmp_path / "a", tmp_path / "b"]
    words = ("--nproc_per_node=1", "--nnodes=2", "--rdzv-backend=c10d", "--max-restarts=2")
    settings = (*WORDS, "train.total_steps=320", "run_dir=run", "auto_resume=true")
    runs = []
    for machine in machines:
        machine.mkdir()
        runs.append(launch(machine, *words, meeting, "-m", "embodied_rl.train", *settings))
    paths = [m / "run" / "ranks" / f"{r}_of_2" for r in (0, 1) for m in machines]
    kill_worker(runs[1], 0, 128, *(machine / "run" for machine in machines))
    printed = [run.communicate(timeout=TIMEOUT)[0] for run in runs]
    assert all(run.returncode == 0 for run in runs), "\n\n".join(printed)[-5000:]
    assert "resuming" in printed[0] + printed[1]
    first = machines[0] if (machines[0] / "run" / "metrics.jsonl").exists() else machines[1]
    assert comparable(first / "run") == comparable(finished[0])
    assert sum(path.is_dir() for path in paths) == 2, "each has the folders of its own rank only"
    assert all((machine / "run" / "config.yaml").is_file() for machine in machines)


def stored(folder: Path) -> list[tuple[float, ...]]:
    """What tells the trajectories of a replay apart, sorted."""
    kept = [t.fields["obs.state"].flatten().tolist() for t in read_all(folder)]
    return sorted(tuple(values) for values in kept)


@pytest.mark.dist
def test_resumes_with_fewer_and_with_more_processes(tmp_path):
    """2 -> 1 -> 2: learner and counters go on, every trajectory and episode has one owner."""
    run = tmp_path / "run"
    finish(tmp_path, 2, *WORDS, "train.total_steps=160", "run_dir=run")
    before, progress = learner(run), state(run, "progress")
    shards = [run / "ranks" / f"{r}_of_2" for r in range(2)]
    experience = sorted(t for shard in shards for t in stored(shard / "replay"))
    episodes = [state(run, "collector"), state(shards[1], "collector")]
    whole = tmp_path / "whole"
    shutil.copytree(run, whole, symlinks=True)

    finish(tmp_path, 1, "resume=run", "train.total_steps=160")
    after = learner(run)
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert state(run, "progress")["updates"] == progress["updates"] > 0
    assert stored(run / "replay") == experience
    alone = state(run, "collector")
    assert alone["numbers"] == [n for e in episodes for n in e["numbers"]]
    assert alone["env_steps"] == 160 and not list((run / "ranks").iterdir())

    finish(tmp_path, 2, "resume=run", "train.total_steps=224")
    again = sorted(t for shard in shards for t in stored(shard / "replay"))
    assert set(experience) < set(again) and len(set(again)) == len(again)
    counts = [len(stored(shard / "replay")) for shard in shards]
    assert abs(counts[0] - counts[1]) <= 4 and not (run / "replay").exists()
    assert all(torch.equal(t, learner(shards[1])[name]) for name, t in learner(run).items())
    records = read_records(run / "metrics.jsonl")
    assert [r["step"] for r in records if "train/updates" in r] == [64, 128, 160, 192, 224]

    shutil.rmtree(whole / "ranks" / "1_of_2")
    refused = start(tmp_path, 1, "resume=whole", "train.total_steps=224")
    printed = refused.communicate(timeout=TIMEOUT)[0]
    assert refused.returncode != 0
    assert "of rank 1 of 2, is missing or damaged" in printed and "bring the folders" in printed


def state(folder: Path, part: str) -> dict:
    """One part of the newest checkpoint."""
    return read_checkpoint((folder / "checkpoints" / "last").resolve())[0][part]


@pytest.mark.unit
def test_shares(make_config):
    ranks = two()[1]
    config = make_config("env.num_envs=4", "eval.num_envs=2", "algorithm.batch_size=16")
    part = share(config, ranks)
    assert (part.env.num_envs, part.eval.num_envs, part.algorithm.batch_size) == (2, 1, 8)
    assert part.seed != config.seed and config.env.num_envs == 4
    for word, name in (
        ("env.num_envs=3", "env.num_envs=3"),
        ("eval.num_envs=1", "eval.num_envs=1"),
        ("algorithm.batch_size=2", "algorithm.batch_size=2"),
    ):
        words = {"env.num_envs": 4, "eval.num_envs": 2, "algorithm.batch_size": 16}
        words |= dict([word.split("=")])
        with pytest.raises(UserError, match=f"{name} cannot be shared by 2 processes"):
            share(make_config(*(f"{k}={v}" for k, v in words.items())), ranks)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("batch", "fraction", "rows"),
    [(12, 0.25, [1, 2]), (16, 0.25, [2, 2]), (4, 0.25, [0, 1]), (4, 0, [0, 0]), (8, 0.99, [4, 4])],
)
def test_demonstrations_are_a_share_of_the_whole_batch(make_config, batch, fraction, rows):
    config = make_config(
        "env.num_envs=4", f"algorithm.batch_size={batch}", f"algorithm.demo.fraction={fraction}"
    )
    parts = [share(config, ranks).algorithm for ranks in two()]
    assert [round(part.demo.fraction * part.batch_size) for part in parts] == rows


@pytest.mark.unit
def test_replay_is_shared(make_config):
    """Sizes of the run, divided and rounded up; what has no bound keeps none."""
    settings = "algorithm.replay_buffer"
    config = make_config(
        "env.num_envs=4",
        f"{settings}.cache_size=9",
        f"{settings}.sample_window_size=8",
        f"{settings}.min_buffer_size=1",
        f"{settings}.cache_bytes=1001",
    )
    for ranks in two():
        part = share(config, ranks).algorithm.replay_buffer
        assert (part.cache_size, part.sample_window_size, part.min_buffer_size) == (5, 4, 1)
        assert (part.cache_bytes, part.max_bytes) == (501, None)
        assert part.segment_size == config.algorithm.replay_buffer.segment_size


def two() -> list[Ranks]:
    """Both of two processes, without their group."""
    pair = [Ranks(), Ranks()]
    for rank, ranks in enumerate(pair):
        ranks.world, ranks.rank = 2, rank
    return pair
