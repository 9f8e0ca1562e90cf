"""`python -m embodied_rl.replay`: what is printed, written, refused, and with which exit code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from embodied_rl import cli
from embodied_rl.errors import UserError
from embodied_rl.replay.__main__ import main
from embodied_rl.replay.options import COMMANDS, help_text
from embodied_rl.replay.reader import StoreReader, read_all
from embodied_rl.replay.store import TrajectoryStore
from embodied_rl.types import Trajectory

ROOT = Path(__file__).resolve().parent.parent
META = {"task": "PickCube-v1"}


@pytest.fixture
def make_store(tmp_path, make_trajectory):
    """`make_store("a", [3, 2])`: a store in `tmp_path`; `successful` says which succeed."""

    def make(name, lengths, *, first=0, successful=(), segment_size=2, meta=META) -> Path:
        folder = tmp_path / name
        store = TrajectoryStore(folder, segment_size, meta)
        for episode, length in enumerate(lengths, first):
            one = make_trajectory(episode, length)
            one.fields["truncated"] = one.fields.pop("truncated", one.fields.pop("trun", None))
            one.fields["success"][length - 1] = episode in successful
            store.append(one)
        store.close()
        return folder

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def equal(a: list[Trajectory], b: list[Trajectory]) -> bool:
    return len(a) == len(b) and all(
        set(x.fields) == set(y.fields)
        and all(torch.equal(x.fields[k], y.fields[k]) for k in x.fields)
        for x, y in zip(a, b, strict=True)
    )


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(bytes(data))


def rows(text: str) -> dict[str, str]:
    """The table that inspect prints."""
    pairs = (re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in text.splitlines())
    return {p[0]: p[1] for p in pairs if len(p) == 2}


pytestmark = pytest.mark.unit

# ---------------------------------------------------------------- inspect and verify


def test_inspect(make_store, capsys):
    folder = make_store("a", [3, 2, 4], successful={1, 2})
    before = contents(folder)
    assert main(["inspect", str(folder)]) == 0
    table = rows(capsys.readouterr().out)
    assert contents(folder) == before, "it changes nothing"
    assert table["format"] == "embodied_rl.replay version 2"
    assert table["task"] == "PickCube-v1"
    assert table["trajectories"] == "3 (numbers 0 to 2)"
    assert table["transitions"] == "9" and table["environment steps"] == "9"
    assert table["length"] == "2 / 3.0 / 4 (min / mean / max)"
    assert table["on disk"].endswith("in 2 segments")
    assert table["success rate"] == "66.7% at some step, 66.7% at the last"
    returns = [0 + 1 + 2, 100 + 101, 200 + 201 + 202 + 203]  # rewards 100 * episode + t
    spread = f"{min(returns):.2f} / {sum(returns) / 3:.2f} / {max(returns):.2f}"
    assert table["return"] == f"{spread} (min / mean / max)"
    assert re.split(r"\s+", table["obs.state"], maxsplit=1) == ["float32", "[2]"]
    assert re.split(r"\s+", table["action"], maxsplit=1) == ["float32", "[1, 2]"]
    assert "problems" not in table


def test_inspect_the_newest(make_store, capsys):
    folder = make_store("a", [1] * 5, successful={4})
    assert main(["inspect", f"path={folder}", "newest=2"]) == 0
    table = rows(capsys.readouterr().out)
    assert table["success rate"] == "50.0% at some step, 50.0% at the last (newest 2)"
    assert table["return"].startswith("300.00 / 350.00 / 400.00") and "newest 2" in table["return"]


def test_inspect_finds_the_store_of_a_run(make_store, tmp_path, capsys):
    make_store("run/replay", [1])
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert str(tmp_path / "run" / "replay") in capsys.readouterr().out
    assert main(["inspect", "embodied_rl/pretrained/pickcube_state_bc"]) == 0
    assert rows(capsys.readouterr().out)["transitions"] == "2,000"


def test_inspect_an_empty_store(make_store, capsys):
    assert main(["inspect", str(make_store("a", []))]) == 0
    assert rows(capsys.readouterr().out)["trajectories"] == "0"


def test_inspect_and_verify_while_a_run_writes_and_evicts(tmp_path, make_trajectory, capsys):
    folder = tmp_path / "a"
    store = TrajectoryStore(folder, 1, META, max_bytes=4000)
    for episode in range(6):
        store.append(make_trajectory(episode, 3))
    assert store.first > 0
    held = len(store) - store.first
    assert main(["inspect", str(folder)]) == 0
    table = rows(capsys.readouterr().out)
    assert table["trajectories"] == f"{held} (numbers {store.first} to 5)"
    assert main(["verify", str(folder)]) == 0
    assert f"{held} trajectories" in capsys.readouterr().out
    store.close()


def test_a_trajectory_evicted_after_opening_is_passed_over(tmp_path, make_trajectory):
    from embodied_rl.replay.tools import held, read_held

    store = TrajectoryStore(tmp_path / "a", 1, META, max_bytes=4000)
    store.append(make_trajectory(0, 3))
    reader = StoreReader(tmp_path / "a")
    for episode in range(1, 6):
        store.append(make_trajectory(episode, 3))
    assert held(reader) == [0] and store.first > 0
    assert read_held(reader, 0) is None
    store.close()


def test_verify(make_store, capsys):
    folder = make_store("a", [3, 2, 4, 1])
    assert main(["verify", str(folder)]) == 0
    assert "4 trajectories" in (out := capsys.readouterr().out) and "all intact" in out
    first, second = sorted(folder.glob("*.safetensors"))
    flip(first, first.stat().st_size - 1)  # in the data of one trajectory
    flip(second, 20)  # in the header: both trajectories
    before = contents(folder)
    assert main(["verify", str(folder)]) == 1
    *damaged, summary = capsys.readouterr().out.splitlines()
    assert contents(folder) == before
    assert f"{len(damaged)} damaged" in summary
    assert sum(first.name in line for line in damaged) == 1
    assert any(second.name in line for line in damaged)
    assert all(first.name in line or second.name in line for line in damaged)


def test_inspect_a_damaged_store(make_store, capsys):
    folder = make_store("a", [3, 2, 4, 1])
    first = min(folder.glob("*.safetensors"))
    flip(first, first.stat().st_size - 1)
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "problems" in out and "is damaged" in out


# ---------------------------------------------------------------- merge


def test_merge(make_store, tmp_path, capsys):
    a, b = make_store("a", [3, 2]), make_store("b", [4], first=7)
    assert main(["merge", str(a), str(b), f"out={tmp_path / 'c'}", "segment_size=1"]) == 0
    assert "3 trajectories from 2 stores" in capsys.readouterr().out
    assert equal(read_all(tmp_path / "c"), read_all(a) + read_all(b))
    reader = StoreReader(tmp_path / "c")
    assert reader.meta["task"] == "PickCube-v1" and len(reader.segments) == 3


def test_merge_filters(make_store, tmp_path):
    a = make_store("a", [1, 2, 3], successful={0, 2})
    b = make_store("b", [4, 5], first=3, successful={3})
    both = read_all(a) + read_all(b)
    out = f"out={tmp_path / 'c'}"
    assert main(["merge", str(a), str(b), out, "newest=2"]) == 0
    assert equal(read_all(tmp_path / "c"), both[-2:])
    assert main(["merge", str(a), str(b), out, "overwrite=true", "successful=true"]) == 0
    assert equal(read_all(tmp_path / "c"), [both[0], both[2], both[3]])
    words = [str(a), str(b), out, "overwrite=true", "successful=true", "newest=2"]
    assert main(["merge", *words]) == 0
    assert equal(read_all(tmp_path / "c"), [both[2], both[3]])


def test_merge_leaves_damage_out_and_says_so(make_store, tmp_path, capsys):
    a = make_store("a", [3, 2])
    (segment,) = a.glob("*.safetensors")
    flip(segment, segment.stat().st_size - 1)
    assert main(["merge", str(a), f"out={tmp_path / 'c'}"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("1 trajectories") and "is damaged" in told.err
    assert len(read_all(tmp_path / "c")) == 1


def test_merge_refuses_strangers(make_store, tmp_path):
    a, b = make_store("a", [3]), make_store("b", [3], meta={"task": "PushCube-v1"})
    with pytest.raises(UserError, match="task='PushCube-v1' there, task='PickCube-v1' here"):
        main(["merge", str(a), str(b), f"out={tmp_path / 'c'}"])
    one = read_all(a)[0]
    one.fields["obs.state"] = one.fields["obs.state"].double()
    one.fields["extra"] = one.fields["steps"]
    store = TrajectoryStore(tmp_path / "d", 1, META)
    store.append(one)
    store.close()
    with pytest.raises(UserError, match=r"extra is int64 \[\] there, absent here.*obs.state"):
        main(["merge", str(a), str(tmp_path / "d"), f"out={tmp_path / 'c'}"])
    with pytest.raises(UserError, match="no trajectory there that succeeded"):
        main(["merge", str(a), f"out={tmp_path / 'c'}", "successful=true"])
    assert not (tmp_path / "c").exists()


def test_nothing_is_overwritten_unasked(make_store, tmp_path):
    a, b = make_store("a", [3]), make_store("b", [2])
    before = contents(b)
    with pytest.raises(UserError, match="is not empty.*overwrite=true"):
        main(["merge", str(a), f"out={b}"])
    with pytest.raises(UserError, match="is not empty.*overwrite=true"):
        main(["export", str(a), f"out={b}"])
    for out in (a, a / "inside", tmp_path):
        with pytest.raises(UserError, match="lie in one another"):
            main(["merge", str(a), f"out={out}", "overwrite=true"])
    assert contents(b) == before and len(read_all(a)) == 1


# ---------------------------------------------------------------- export and import


def test_maniskill_and_back(make_store, tmp_path, capsys):
    a, out = make_store("a", [3, 2, 4], successful={2}), tmp_path / "x" / "demos.h5"
    assert main(["export", str(a), f"out={out}"]) == 0
    assert json.loads(out.with_suffix(".json").read_text())["env_info"]["env_id"] == "PickCube-v1"
    assert main(["import", str(out), f"out={tmp_path / 'b'}"]) == 0
    assert equal(read_all(tmp_path / "b"), read_all(a))
    assert StoreReader(tmp_path / "b").meta == StoreReader(a).meta
    with pytest.raises(UserError, match="is there already.*overwrite=true"):
        main(["export", str(a), f"out={out}"])
    assert main(["export", str(a), f"out={out}", "overwrite=true", "successful=true"]) == 0
    assert main(["import", str(out), f"out={tmp_path / 'b'}", "overwrite=true"]) == 0
    assert equal(read_all(tmp_path / "b"), read_all(a)[2:])


def test_lerobot_and_back(make_store, tmp_path):
    pytest.importorskip("pyarrow")
    a, out = make_store("a", [3, 2, 4]), tmp_path / "dataset"
    assert main(["export", str(a), f"out={out}", "task=pick the cube", "fps=10"]) == 0
    info = json.loads((out / "meta/info.json").read_text())
    assert info["fps"] == 10 and info["total_frames"] == 9
    assert main(["import", str(out), f"out={tmp_path / 'b'}"]) == 0
    assert equal(read_all(tmp_path / "b"), read_all(a))
    assert StoreReader(tmp_path / "b").meta == StoreReader(a).meta


def test_the_task_comes_from_the_run(make_store, make_config, tmp_path):
    pytest.importorskip("pyarrow")
    from embodied_rl.load_config import save_config

    make_store("run/replay", [2], meta={"fingerprint": "x"})
    run, out = tmp_path / "run", tmp_path / "t.h5"
    with pytest.raises(UserError, match="does not say which task.*env.task="):
        main(["export", str(run), f"out={out}"])
    assert main(["export", str(run), f"out={tmp_path / 'd'}", "task=reach the middle"]) == 0
    save_config(make_config("env.task=reach", "env.reward_mode=dense"), run / "config.yaml")
    main(["export", str(run), f"out={out}", "env.control_mode=pd_joint_pos"])
    info = json.loads(out.with_suffix(".json").read_text())["env_info"]
    assert info["env_id"] == "reach" and info["env_kwargs"]["reward_mode"] == "dense"
    assert info["env_kwargs"]["control_mode"] == "pd_joint_pos"


# ---------------------------------------------------------------- what is typed wrongly


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no command given.*inspect, verify, merge, export, import"),
        (["inspct"], "unknown command 'inspct'.*Did you mean 'inspect'"),
        (["inspect"], "no path given"),
        (["inspect", "a", "b"], "takes one path, got 2: a, b"),
        (["inspect", "absent"], "absent is no folder.*Name a run folder"),
        (["inspect", "tests"], "tests holds no store"),
        (["inspect", "a", "newst=3"], "unknown config key 'newst'.*Did you mean 'newest'"),
        (["inspect", "a", "newest=0"], "newest=0 is out of range"),
        (["inspect", "a", "--newest"], "cannot read argument '--newest'"),
        (["merge", "a"], "no output given. Set out="),
        (["merge", "a", "out=b", "compression=gzip"], "compression='gzip'.*none, zstd"),
        (["merge", "a", "out=b", "segment_size=0"], "segment_size=0 is out of range"),
        (["export", "a", "out=b", "format=lerobt"], "format='lerobt'.*Did you mean 'lerobot'"),
        (["import", "absent", "out=b"], "absent does not exist"),
        (["import", "tests", "out=b"], "tests is neither an .h5 file nor a LeRobot dataset"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(UserError, match=message):
        main(words)


def test_a_maniskill_file_ends_in_h5(make_store, tmp_path):
    words = ["export", str(make_store("a", [1])), f"out={tmp_path / 'b'}", "format=maniskill"]
    with pytest.raises(UserError, match="ends in .h5"):
        main(words)


def test_help_names_every_key():
    import dataclasses

    text = help_text()
    for name, schema in COMMANDS.items():
        assert f"  {name} " in text
        for f in dataclasses.fields(schema):
            assert f.name in ("path", "paths") or f.name in text, f.name


def run(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "embodied_rl.replay", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_exit_codes(make_store):
    folder = make_store("a", [3])
    assert (done := run("verify", folder)).returncode == 0, done.stderr
    flip(segment := next(folder.glob("*.safetensors")), segment.stat().st_size - 1)
    assert run("verify", folder).returncode == 1
    wrong = run("verify", folder / "absent")
    assert wrong.returncode == cli.USER_ERROR
    assert wrong.stderr.startswith("error: ") and "Traceback" not in wrong.stderr
    shown = run("merge", "--help")
    assert shown.returncode == 0 and shown.stdout.strip() == help_text().strip()


def test_help_imports_neither_torch_nor_the_simulator():
    code = (
        "import sys; sys.argv = ['replay', '--help']\n"
        "import runpy\n"
        "try: runpy.run_module('embodied_rl.replay', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'mani_skill', 'h5py', 'omegaconf'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
