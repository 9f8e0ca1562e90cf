"""Saving, damage, pruning and restoring."""

import json
import os
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import planted

from embodied_rl.checkpoint import VERSION, Checkpoints
from embodied_rl.errors import UserError
from embodied_rl.generators import Generators
from embodied_rl.manifest import write_manifest
from embodied_rl.policy import Policy

pytestmark = pytest.mark.unit


class Part:
    """Holds whatever state it is given."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


@pytest.fixture
def policy(make_backbone):
    return Policy(make_backbone(), "state")


@pytest.fixture
def make(tmp_path):
    def build(state: dict[str, Any], keep: int = 2) -> tuple[Checkpoints, Part]:
        part = Part(state)
        return Checkpoints(tmp_path / "checkpoints", {"part": part}, keep), part

    return build


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_round_trip_of_nested_state(make, policy):
    transposed = torch.arange(6.0).view(2, 3).T
    state = {
        "ints": {0: {"step": torch.tensor(3.0)}, 17: {"step": torch.tensor(4, dtype=torch.int64)}},
        "list": [1, 2.5, None, True, "text", [torch.ones(2, dtype=torch.bool)], {}],
        "tuple": (1, 2),
        "empty": {},
        "rng": {"big": 2**127 + 1, "float": 0.1 + 0.2},
        "a/b": {"c": torch.zeros(0, 3)},
        "a": {"b.c": transposed},
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "$tensor": 5,
        "$dict": {"x": 1},
    }
    checkpoints, part = make(state)
    checkpoints.save(5, policy, best=False)
    part.state = {}
    assert checkpoints.restore() == 5
    restored = part.state
    assert list(restored) == list(state)
    assert list(restored["ints"]) == [0, 17], "integer keys stay integers"
    for number, step in ((0, torch.tensor(3.0)), (17, torch.tensor(4))):
        assert torch.equal(restored["ints"][number]["step"], step)
        assert restored["ints"][number]["step"].dtype == step.dtype
    assert restored["list"][:5] == [1, 2.5, None, True, "text"] and restored["list"][6] == {}
    assert restored["list"][5][0].tolist() == [True, True]
    assert restored["tuple"] == [1, 2] and restored["empty"] == {}
    assert restored["rng"] == state["rng"]
    assert restored["a/b"]["c"].shape == (0, 3)
    assert torch.equal(restored["a"]["b.c"], transposed)
    assert torch.equal(restored["half"], state["half"])
    assert restored["half"].dtype == torch.bfloat16
    assert restored["$tensor"] == 5 and restored["$dict"] == {"x": 1}


def test_keys_with_slashes_do_not_collide(make, policy):
    checkpoints, part = make({"a/b": {"c": torch.zeros(1)}, "a": {"b/c": torch.ones(1)}})
    checkpoints.save(1, policy, best=False)
    checkpoints.restore()
    assert part.state["a/b"]["c"].tolist() == [0] and part.state["a"]["b/c"].tolist() == [1]


def test_saving_does_not_alias(make, policy):
    tensor = torch.zeros(3)
    checkpoints, part = make({"x": tensor, "view": tensor[:2]})
    checkpoints.save(1, policy, best=False)
    tensor += 1
    checkpoints.restore()
    assert part.state["x"].tolist() == [0, 0, 0] and part.state["view"].tolist() == [0, 0]


def test_what_cannot_be_saved_is_named(make, policy):
    checkpoints, _ = make({"deep": [object()]})
    with pytest.raises(TypeError, match=r"/part/deep/0: .*object"):
        checkpoints.save(1, policy, best=False)


def test_nothing_but_safetensors_and_json(make, policy, tmp_path):
    checkpoints, _ = make({"x": torch.ones(2)})
    folder = checkpoints.save(7, policy, best=True)
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert files == [
        "manifest.json",
        "policy/config.json",
        "policy/model.safetensors",
        "state.json",
        "state.safetensors",
    ]
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())
    assert not [p for p in folder.rglob("*") if p.is_file() and p.read_bytes()[:2] == b"PK"]
    loaded = Policy.from_pretrained(tmp_path / "checkpoints" / "best" / "policy")
    assert loaded.backbone.fingerprint() == policy.backbone.fingerprint()


def test_pruning_keeps_the_best_and_the_newest(make, policy, tmp_path):
    checkpoints, part = make({}, keep=2)
    for step in range(0, 60, 10):
        part.state = {"step": step}
        checkpoints.save(step, policy, best=step == 10)
    folder = tmp_path / "checkpoints"
    kept = ["step_000000010", "step_000000040", "step_000000050"]
    assert names(folder) == ["best", "last", *kept]
    assert (folder / "best").resolve().name == kept[0]
    assert (folder / "last").resolve().name == kept[2]
    assert checkpoints.restore() == 50 and part.state == {"step": 50}
    checkpoints.save(60, policy, best=True)
    assert names(folder) == ["best", "last", "step_000000050", "step_000000060"]


def test_same_step_again_replaces(make, policy, tmp_path):
    checkpoints, part = make({"v": 1})
    checkpoints.save(3, policy, best=True)
    part.state = {"v": 2}
    checkpoints.save(3, policy, best=False)
    checkpoints.restore()
    assert part.state == {"v": 2}
    assert (tmp_path / "checkpoints" / "best" / "state.json").is_file()


# ---------------------------------------------------------------- damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def replace(old: str, new: str):
    def edit(path: Path) -> None:
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return edit


def write(data: bytes):
    return lambda path: path.write_bytes(data)


FILES = ("state.safetensors", "state.json", "manifest.json", "policy/model.safetensors")
NAMED = {  # damage that no manifest hides: where, how
    "tensors truncated": ("state.safetensors", truncate),
    "tensors gone": ("state.safetensors", Path.unlink),
    "json truncated": ("state.json", truncate),
    "json empty": ("state.json", write(b"")),
    "json binary": ("state.json", write(b"\xff\xfe\xfa")),
    "json of another kind": ("state.json", write(b"[1, 2]")),
    "json nested without end": ("state.json", write(b"[" * 100_000)),
    "reference to no tensor": ("state.json", replace("part/x", "part/y")),
    "of another format": ("state.json", replace("embodied_rl.checkpoint", "else")),
}


@pytest.fixture
def two(make, policy):
    """Checkpoints 10 and 20 (x is 1 and 2); returns them, the part and the newer folder."""
    checkpoints, part = make({"x": torch.tensor([1.0])})
    checkpoints.save(10, policy, best=True)
    part.state = {"x": torch.tensor([2.0])}
    return checkpoints, part, checkpoints.save(20, policy, best=False)


def assert_fell_back(checkpoints, part) -> None:
    assert checkpoints.restore() == 10 and part.state["x"].tolist() == [1.0]
    (problem,) = checkpoints.problems
    assert problem.startswith("step_000000020 is damaged and was not used: ")
    assert names(checkpoints.folder) == ["best", "damaged_step_000000020", "last", "step_000000010"]
    assert checkpoints.last == checkpoints.best == "step_000000010"


@pytest.mark.parametrize("change", [truncate, flip, Path.unlink, write(b"")])
@pytest.mark.parametrize("file", FILES)
def test_damaged_newest_falls_back_and_is_told(two, file, change):
    checkpoints, part, folder = two
    change(folder / file)
    assert_fell_back(checkpoints, part)
    if file != "manifest.json":
        assert file in checkpoints.problems[0]


@pytest.mark.parametrize("how", NAMED)
def test_damage_that_the_manifest_agrees_with(two, how):
    checkpoints, part, folder = two
    file, change = NAMED[how]
    change(folder / file)
    write_manifest(folder)
    assert_fell_back(checkpoints, part)


def test_foreign_and_missing_files_and_empty_folders(two):
    checkpoints, part, folder = two
    (folder / "notes.txt").write_text("mine")
    assert_fell_back(checkpoints, part)
    assert "notes.txt is not in the manifest" in checkpoints.problems[0]
    (checkpoints.folder / "step_000000030").mkdir()
    assert checkpoints.restore() == 10 and "step_000000030" in checkpoints.problems[1]


def test_every_bit_counts(make, policy):
    """Whatever single bit of whatever file flips, the checkpoint is not used or still the same."""
    checkpoints, part = make({"x": torch.tensor([1.0, 2.0])})
    folder = checkpoints.save(10, policy, best=False)
    rng = np.random.default_rng(0)
    for path in [p for p in sorted(folder.rglob("*")) if p.is_file()]:
        original = path.read_bytes()
        for position in rng.choice(len(original), 40, replace=False):
            data = bytearray(original)
            data[position] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
            part.state = {}
            try:
                checkpoints.restore()
            except UserError as error:
                assert "is damaged" in str(error)
            else:
                assert path.name == "manifest.json", "white space, say"
                assert part.state["x"].tolist() == [1.0, 2.0]
            path.write_bytes(original)
    assert checkpoints.restore() == 10


def test_damaged_best_is_told(two):
    checkpoints, part, _ = two
    flip(checkpoints.folder / "step_000000010" / "policy" / "model.safetensors")
    assert checkpoints.restore() == 20 and part.state["x"].tolist() == [2.0]
    assert checkpoints.problems[0].startswith("step_000000010, the best, is damaged: ")
    assert checkpoints.best is None and checkpoints.last == "step_000000020"


@pytest.mark.parametrize("best", [False, True])
def test_damaged_newest_that_other_processes_lack(make, policy, best):
    """It is set aside and told, as by a process alone; whole ones that they lack are deleted."""
    checkpoints, part = make({"x": torch.tensor([1.0])}, keep=9)
    checkpoints.save(10, policy, best=not best)
    checkpoints.save(20, policy, best=False)
    flip(checkpoints.save(30, policy, best=best) / "state.safetensors")
    part.state = {}
    assert checkpoints.restore({10}) == 10 and part.state["x"].tolist() == [1.0]
    (problem,) = checkpoints.problems
    assert problem.startswith("step_000000030 is damaged and was not used: ")
    links = ["last"] if best else ["best", "last"]
    assert names(checkpoints.folder) == sorted([*links, "damaged_step_000000030", "step_000000010"])
    assert checkpoints.last == "step_000000010"
    assert checkpoints.best == (None if best else "step_000000010")


def test_best_that_other_processes_lack(two, policy):
    """It is deleted and no longer linked to."""
    checkpoints, part, _ = two
    checkpoints.save(30, policy, best=True)
    assert checkpoints.restore({20}) == 20 and part.state["x"].tolist() == [2.0]
    assert names(checkpoints.folder) == ["last", "step_000000020"] and checkpoints.best is None


def test_nothing_usable(make, policy):
    checkpoints, _ = make({})
    with pytest.raises(UserError, match="no usable checkpoint"):
        checkpoints.restore()
    write(b"")(checkpoints.save(10, policy, best=False) / "state.json")
    with pytest.raises(UserError, match=r"step_000000010 is damaged .*Start the run anew"):
        checkpoints.restore()
    assert names(checkpoints.folder) == ["last", "step_000000010"], "nothing to fall back on"


@pytest.mark.parametrize("file", ["state.json", "state.safetensors", "manifest.json"])
@pytest.mark.parametrize("agreeing", [False, True], ids=["old manifest", "manifest made to fit"])
def test_planted_pickle_is_refused_and_not_executed(two, tmp_path, file, agreeing):
    checkpoints, part, folder = two
    (folder / file).write_bytes(planted(tmp_path / "executed"))
    if agreeing and file != "manifest.json":
        write_manifest(folder)
    assert_fell_back(checkpoints, part)
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------- versions


def set_version(folder: Path, version: int, needs: int) -> None:
    path = folder / "state.json"
    document = json.loads(path.read_text())
    assert document["version"] == VERSION and document["min_reader_version"] <= VERSION
    document |= {"version": version, "min_reader_version": needs, "written_by": "9.8.7"}
    document["state"]["$dict"].append(["a part of the future", 5])
    path.write_text(json.dumps(document))
    write_manifest(folder)


def test_newer_version_that_allows_it_is_read(two):
    checkpoints, part, folder = two
    set_version(folder, VERSION + 5, VERSION)
    assert checkpoints.restore() == 20 and part.state["x"].tolist() == [2.0]


def test_newer_version_that_does_not_is_named(two):
    """It is not damaged: going back to an older checkpoint would throw work away."""
    checkpoints, _, folder = two
    set_version(folder, VERSION + 5, VERSION + 1)
    with pytest.raises(UserError, match=r"written by embodied_rl 9\.8\.7 .*Upgrade embodied_rl"):
        checkpoints.restore()
    assert folder.is_dir(), "left as it was"


def test_half_written_checkpoint_does_not_count(make, policy, tmp_path):
    checkpoints, part = make({"v": 1})
    checkpoints.save(10, policy, best=False)
    torn = tmp_path / "checkpoints" / ".step_000000020.tmp"
    torn.mkdir()
    (torn / "state.json").write_text("{")
    assert checkpoints.restore() == 10
    part.state = {"v": 2}
    checkpoints.save(20, policy, best=False)
    assert checkpoints.restore() == 20 and part.state == {"v": 2}
    assert not torn.exists()


def test_state_that_does_not_fit_is_explained(make, policy):
    class Picky(Part):
        def load_state_dict(self, state):
            torch.nn.Linear(2, 2).load_state_dict(state)

    checkpoints, _ = make({"weight": torch.ones(3, 2), "bias": torch.ones(3)})
    checkpoints.save(10, policy, best=False)
    checkpoints.parts["part"] = Picky({})
    with pytest.raises(UserError, match=r"does not fit this config(.|\n)*size mismatch"):
        checkpoints.restore()


def test_generators_are_restored(tmp_path, policy):
    checkpoints = Checkpoints(tmp_path / "c", {"generators": Generators()}, 2)

    def draw():
        return [*torch.randn(5).tolist(), *np.random.randn(3), random.random(), random.gauss(0, 1)]

    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        draw()  # an odd number of Gaussians: the spare one is state too
        checkpoints.save(1, policy, best=False)
        expected = draw()
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        assert checkpoints.restore() == 1 and draw() == expected
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


# ---------------------------------------------------------------- disks that refuse


def test_folder_replaced_by_a_file(make, policy, tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    checkpoints, _ = make({})
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*resume="):
        checkpoints.save(1, policy, best=False)


def test_link_that_cannot_be_made(make, policy, tmp_path):
    (tmp_path / "checkpoints" / "last" / "in the way").mkdir(parents=True)
    checkpoints, _ = make({})
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*resume="):
        checkpoints.save(1, policy, best=False)


def test_full_disk(make, policy, tmp_path):
    checkpoints, part = make({"x": torch.zeros(2)})
    checkpoints.save(10, policy, best=False)
    part.state = {"x": torch.zeros(100_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # as a full disk: write fails
        with pytest.raises(UserError, match=r"cannot write the checkpoint .*Older .* intact"):
            checkpoints.save(20, policy, best=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path / "checkpoints") == ["last", "step_000000010"]
    assert checkpoints.restore() == 10


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(make, policy, tmp_path):
    (tmp_path / "checkpoints").mkdir(mode=0o500)
    checkpoints, _ = make({})
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        checkpoints.save(1, policy, best=False)
