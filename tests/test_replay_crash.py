"""A store whose writer is killed, whose files are cut and whose bits are flipped.

Every trajectory's content follows from its number, so each row that a store returns can be judged.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from embodied_rl.errors import UserError
from embodied_rl.replay.reader import StoreReader
from embodied_rl.replay.store import TrajectoryStore
from embodied_rl.types import Trajectory

pytestmark = pytest.mark.e2e
KILLS, CUTS, FLIPS = 300, 300, 300


def made(number: int) -> Trajectory:
    """The trajectory that has this number in every store here."""
    rows = number % 7 + 2
    base = torch.arange(rows, dtype=torch.float32) + 1000 * number
    return Trajectory(
        {
            "obs.state": base[:, None].repeat(1, 12),
            "obs.rgb": (base[:, None, None, None].repeat(1, 4, 4, 3) % 251).to(torch.uint8),
            "action": base[:, None, None].repeat(1, 1, 2),
            "reward": base[:, None],
            "terminated": torch.zeros(rows, dtype=torch.bool),
        }
    )


def judge(store: StoreReader) -> set[int]:
    """Returns the numbers that read back; fails on a row that is not what was written."""
    good = set()
    for number in range(store.first, len(store)):
        if not store.length(number):
            continue
        try:
            fields = store.read(number)
        except UserError as error:
            assert "damaged" in str(error)
            continue
        expected = made(number).fields
        assert fields.keys() == expected.keys()
        assert all(torch.equal(fields[k], v) for k, v in expected.items()), number
        good.add(number)
    return good


def write_until_killed(folder: Path) -> None:
    """The writer's process: appends for ever and says which numbers were flushed."""
    store = TrajectoryStore(folder, 4, {})
    while True:
        store.append(made(len(store)))
        if not store._pending:
            os.write(1, f"{len(store)}\n".encode())


@pytest.mark.parametrize("how", ["SIGKILL", "byte"])
def test_killed_writer(tmp_path, how):
    """The same store through hundreds of deaths: by SIGKILL at a random moment, or at the very
    byte at which the kernel kills a process whose file outgrows its limit (SIGXFSZ)."""
    rng = random.Random(0)
    folder = tmp_path / "store"
    known, died_writing = 0, 0
    for _ in range(KILLS // 2):
        if len(list(folder.glob("segment-*"))) > 15:
            shutil.rmtree(folder)
            known = 0
        limit = rng.randrange(1, 3300) if how == "byte" else 0
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(write_end, 1)
            if limit:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                write_until_killed(folder)
            finally:
                os._exit(1)
        os.close(write_end)
        if not limit:
            time.sleep(rng.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
        with os.fdopen(read_end) as pipe:
            said = [int(line) for line in pipe.read().split("\n")[:-1]]
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the writer ended by itself: {status}"
        known = max([known, *said])
        died_writing += any(folder.glob("*.tmp"))
        if folder.exists() and (folder / "meta.json").exists():
            reader = StoreReader(folder)
            assert reader.problems == [] and reader.verify() == []
            assert judge(reader) == set(range(len(reader))) and len(reader) >= known
            known = len(reader)
        if not limit or not any(folder.glob("index.jsonl*")):
            continue
        if (folder / "index.jsonl").stat().st_size >= 1000:  # else the limit only hits the index
            shutil.rmtree(folder)
            known = 0
    assert died_writing > 10, "some deaths must fall into the middle of a file"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store of 24 trajectories in 6 segments, half of them compressed."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    for compression in ("none", "zstd"):
        store = TrajectoryStore(folder, 4, {}, compression=compression)
        for _ in range(12):
            store.append(made(len(store)))
        store.close()
    return folder


def harmed_copy(whole: Path, tmp_path: Path, rng: random.Random) -> tuple[Path, Path, bytearray]:
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    victim = rng.choice([p for p in sorted(folder.iterdir()) if p.name not in (".lock",)])
    return folder, victim, bytearray(victim.read_bytes())


def check(folder: Path, victim: Path) -> None:
    """Reader and writer both open, return nothing wrong, and lose nothing but the victim's."""
    if victim.name == "meta.json":
        try:
            opened = StoreReader(folder)
        except UserError:
            return  # told; nothing else can be said of a folder without its format
        assert judge(opened) == set(range(24))
        return
    for kind in (StoreReader, lambda f: TrajectoryStore(f, 4, {})):
        store = kind(folder)
        good = judge(store)
        lost = set(range(24)) - good
        if victim.name.startswith("segment"):
            first = int(victim.stem.split("-")[1])
            assert lost <= set(range(first, first + 4))
        else:
            assert not lost, "segments describe themselves"
        assert bool(lost) <= bool(store.problems), "what is dropped is told"
        if isinstance(store, TrajectoryStore):
            store.append(made(len(store)))
            store.close()
    # a second opening finds the same
    again = StoreReader(folder)
    assert judge(again) == good | {24}


def test_cut_files(whole, tmp_path):
    rng = random.Random(1)
    for _ in range(CUTS):
        folder, victim, data = harmed_copy(whole, tmp_path, rng)
        victim.write_bytes(data[: rng.randrange(len(data))])
        check(folder, victim)


def test_flipped_bits(whole, tmp_path):
    rng = random.Random(2)
    for _ in range(FLIPS):
        folder, victim, data = harmed_copy(whole, tmp_path, rng)
        for _ in range(rng.choice([1, 1, 8])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        victim.write_bytes(data)
        check(folder, victim)


def test_full_disk_on_a_small_tmpfs(tmp_path):
    """A real full disk: the error is told, everything published reads, freed space goes on."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no permission to mount a tmpfs")
    try:
        ballast = mount / "ballast"
        ballast.write_bytes(bytes(64 * 1024))
        store = TrajectoryStore(mount / "store", 4, {})
        with pytest.raises(UserError, match=r"cannot write replay.*[Ff]ree some space"):
            for _ in range(10_000):
                store.append(made(len(store)))
        published = len(store) - len(store._pending)
        reader = StoreReader(mount / "store")
        assert reader.problems == [] and judge(reader) == set(range(len(reader)))
        assert len(reader) == published > 0
        ballast.unlink()
        store.flush()  # what was pending is still in memory
        assert judge(StoreReader(mount / "store")) == set(range(published + 4))
        store.close()
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def test_a_planted_pickle_is_not_executed(whole, tmp_path):
    """A segment, index or meta file that holds a pickle is refused like any other damage."""
    import pickle

    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (marker,))

    payload = pickle.dumps(Bomb())
    for name in ("segment-000000000.safetensors", "index.jsonl", "meta.json"):
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        (folder / name).write_bytes(payload)
        try:
            judge(StoreReader(folder))
        except UserError:
            assert name == "meta.json"
    assert not marker.exists()
    pickle.loads(payload)
    assert marker.exists(), "the bomb itself works"


def test_numpy_alone_reads_a_store(whole, tmp_path):
    """The reader printed in docs/replay_format.md, run as it stands, without torch."""
    text = (Path(__file__).parent.parent / "docs" / "replay_format.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    folder = tmp_path / "plain"
    store = TrajectoryStore(folder, 4, {})
    for number in range(10):
        store.append(made(number))
    store.close()
    script = code + (
        "\nimport json, sys\n"
        "assert 'torch' not in sys.modules\n"
        "out = [[float(t['reward'].sum()), list(t['obs.rgb'].shape)] for t in "
        "read_trajectories(sys.argv[1])]\n"
        "print(json.dumps(out))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True
    )
    expected = [
        [float(made(n).fields["reward"].sum()), list(made(n).fields["obs.rgb"].shape)]
        for n in range(10)
    ]
    assert json.loads(done.stdout) == expected
