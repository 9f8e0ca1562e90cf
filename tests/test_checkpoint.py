"""Saving, damage, pruning and restoring."""

import json
import os
import resource
import shutil
from typing import Any

import pytest
import torch

from embodied_rl.checkpoint import VERSION, Checkpoints, TorchRandom
from embodied_rl.errors import UserError
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


def damage(folder, how: str) -> None:
    tensors, state = folder / "state.safetensors", folder / "state.json"
    if how == "truncated tensors":
        tensors.write_bytes(tensors.read_bytes()[:-3])
    elif how == "no tensors":
        tensors.unlink()
    elif how == "truncated json":
        state.write_text(state.read_text()[:-9])
    elif how == "empty json":
        state.write_text("")
    elif how == "binary json":
        state.write_bytes(b"\xff\xfe\xfa")
    elif how == "json of another kind":
        state.write_text("[1, 2]")
    elif how == "tensor missing":
        state.write_text(state.read_text().replace("part/x", "part/y"))
    elif how == "another version":
        now = f'"version": {VERSION}'
        assert now in state.read_text()
        state.write_text(state.read_text().replace(now, '"version": 99'))
    else:
        shutil.rmtree(folder)
        folder.mkdir()


@pytest.mark.parametrize(
    "how",
    [
        "truncated tensors",
        "no tensors",
        "truncated json",
        "empty json",
        "binary json",
        "json of another kind",
        "tensor missing",
        "another version",
        "empty folder",
    ],
)
def test_damaged_newest_falls_back(make, policy, how):
    checkpoints, part = make({"x": torch.tensor([1.0])})
    checkpoints.save(10, policy, best=False)
    part.state = {"x": torch.tensor([2.0])}
    damage(checkpoints.save(20, policy, best=False), how)
    assert checkpoints.restore() == 10
    assert part.state["x"].tolist() == [1.0]


def test_nothing_usable(make, policy):
    checkpoints, _ = make({})
    with pytest.raises(UserError, match="no usable checkpoint"):
        checkpoints.restore()
    damage(checkpoints.save(10, policy, best=False), "empty json")
    with pytest.raises(UserError, match=r"Unreadable: step_000000010: .*Start the run anew"):
        checkpoints.restore()


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


def test_torch_generator_is_restored(tmp_path, policy):
    checkpoints = Checkpoints(tmp_path / "c", {"torch": TorchRandom()}, 2)
    torch.manual_seed(11)
    torch.randn(5)
    checkpoints.save(1, policy, best=False)
    expected = torch.randn(5)
    torch.manual_seed(0)
    checkpoints.restore()
    assert torch.equal(torch.randn(5), expected)


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
