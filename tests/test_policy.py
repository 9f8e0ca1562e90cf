"""Policy folders: saving, loading, and every way in which a folder can be wrong."""

import json
import zlib

import pytest
import tiny_pi0
import torch
from conftest import planted
from safetensors.torch import load_file, save_file
from tiny_flow import TinyFlow

from embodied_rl.config import ActorConfig
from embodied_rl.errors import UserError
from embodied_rl.policy import SHIPPED, Policy, find_policy
from embodied_rl.registry import ACTORS

pytestmark = pytest.mark.unit
OBS = {"state": torch.tensor([[0.5, -0.5, 100.0, 3.0], [0.1, 0.9, 7.0, 0.0]])}


@pytest.fixture
def make(make_backbone, make_config):
    def build(actor: str | None = None, chunk: int = 3, execute: int | None = 2) -> Policy:
        backbone = TinyFlow(4, 2, chunk) if actor == "noise" else make_backbone(chunk)
        adapter = None
        if actor is not None:
            adapter = ACTORS.get(actor).for_backbone(backbone, make_config().actor, None, execute)
            with torch.no_grad():
                for p in adapter.parameters():
                    p.add_(0.1 * torch.randn_like(p))
        kind = "tiny_flow" if actor == "noise" else "state"
        return Policy(backbone, kind, adapter, actor, {"type": "fake", "task": "reach"}, execute)

    return build


@pytest.mark.parametrize("actor", [None, *ACTORS.names])
def test_round_trip(make, tmp_path, actor, flow_folder):
    policy = make(actor)
    policy.save_pretrained(tmp_path / "p")
    loaded = Policy.from_pretrained(tmp_path / "p")
    assert loaded.actor_type == actor and loaded.backbone_type == policy.backbone_type
    assert loaded.env == policy.env and loaded.execute_steps == 2
    assert loaded.backbone.fingerprint() == policy.backbone.fingerprint()
    action = policy.act(OBS)
    assert action.shape == (2, 2, 2) and not action.requires_grad
    assert torch.equal(loaded.act(OBS), action)
    assert torch.equal(loaded.act(OBS), loaded.act(OBS))
    for p in (policy, loaded):
        torch.manual_seed(4)
        noisy = p.act(OBS, deterministic=False)
        assert torch.equal(noisy, action) == (actor is None)
    torch.manual_seed(4)
    assert torch.equal(policy.act(OBS, deterministic=False), noisy)


def test_execute_steps_is_bounded_by_the_chunk(make):
    assert [make(execute=e).execute_steps for e in (None, 1, 3, 9)] == [3, 1, 3, 3]


def test_found_in_run_and_checkpoint_folders(make, tmp_path):
    places = ("policy", "checkpoints/best/policy", "checkpoints/last/policy")
    for i, place in enumerate(places):
        run = tmp_path / str(i)
        make().save_pretrained(run / place)
        assert find_policy(run) == run / place
    make().save_pretrained(tmp_path / "2" / "checkpoints" / "best" / "policy")
    assert find_policy(tmp_path / "2").parent.name == "best", "the best before the last"


def test_unknown_path_lists_the_shipped_names(tmp_path):
    with pytest.raises(UserError) as caught:
        Policy.from_pretrained(tmp_path / "nowhere")
    assert f"no folder {tmp_path}/nowhere" in str(caught.value)
    shipped = [p.name for p in SHIPPED.glob("*") if p.is_dir()]
    assert all(name in str(caught.value) for name in shipped)
    with pytest.raises(UserError, match=r"holds no config\.json"):
        Policy.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", sorted(p.name for p in SHIPPED.glob("*") if p.is_dir()))
def test_shipped_policies_load(name):
    policy = Policy.from_pretrained(name)
    backbone = policy.backbone
    assert policy.env["task"] or policy.env["instructions"]
    assert all(t.isfinite().all() for t in policy.state_dict().values())
    if policy.env["obs_mode"] == "state":  # the others' tests are those of their backbones
        action = policy.act({"state": torch.zeros(2, backbone.feature_dim)})
        assert action.shape == (2, backbone.chunk_size, backbone.action_dim)


@pytest.fixture
def folder(make, tmp_path):
    make("gaussian").save_pretrained(tmp_path / "p")
    return tmp_path / "p"


def refusal(folder) -> str:
    with pytest.raises(UserError) as caught:
        Policy.from_pretrained(folder)
    return str(caught.value)


def edit(folder, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    message = refusal(folder)
    assert str(folder) in message and "has no model.safetensors" in message


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    message = refusal(folder)
    assert f"{path} is damaged or truncated" in message and "Copy the file again" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", "{}", '{"format": "other"}'])
def test_wrong_config_json(folder, text):
    (folder / "config.json").write_text(text)
    assert str(folder / "config.json") in refusal(folder)


def test_newer_version(folder):
    edit(folder, lambda c: c.update(version=99))
    assert "has version 99, this embodied_rl reads 1. Upgrade embodied_rl." in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("backbone"),
        lambda c: c.pop("actor"),
        lambda c: c["backbone"].pop("type"),
        lambda c: c["backbone"].pop("state_dim"),
        lambda c: c["backbone"].update(colour="red"),
        lambda c: c["backbone"].update(state_dim="four"),
        lambda c: c["backbone"].update(hidden=8),
        lambda c: c.update(backbone="state"),
        lambda c: c["actor"].update(renorm={"momentun": 0.9}),
        lambda c: c["backbone"].update(state_dim=-4),
    ],
)
def test_config_that_describes_no_policy(folder, change):
    edit(folder, change)
    message = refusal(folder)
    assert f"{folder / 'config.json'} does not describe a policy" in message


def test_unknown_types(folder):
    edit(folder, lambda c: c["actor"].update(type="gausian"))
    assert "'gausian'" in refusal(folder) and "Did you mean 'gaussian'?" in refusal(folder)


def test_wrong_sizes(folder):
    edit(folder, lambda c: c["backbone"].update(action_dim=3))
    message = refusal(folder)
    assert f"{folder}: weights and config.json do not agree" in message
    assert "size mismatch" in message


def test_flipped_bit_in_the_weights(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    message = refusal(folder)
    assert f"{path} is damaged or truncated" in message and "another checksum" in message


def test_pickle_in_place_of_the_weights(folder, tmp_path):
    """Refused and not executed, with its checksum made right as well."""
    path, bomb = folder / "model.safetensors", planted(tmp_path / "executed")
    path.write_bytes(bomb)
    assert "is damaged or truncated" in refusal(folder)
    edit(folder, lambda c: c.update(weights={"bytes": len(bomb), "crc32": zlib.crc32(bomb)}))
    assert "is damaged or truncated" in refusal(folder)
    assert not (tmp_path / "executed").exists()


def test_missing_and_foreign_tensors(folder):
    edit(folder, lambda c: c.pop("weights"))  # policies of earlier versions have no checksum
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != name}, path)
    assert name in refusal(folder)
    save_file({**weights, "extra": torch.zeros(1)}, path)
    assert "extra" in refusal(folder)


def test_a_folder_that_refers_to_another(tmp_path):
    """Finetuned from a LeRobot folder, a policy holds its own weights only, and knows that one."""
    source = tiny_pi0.lerobot_folder(tmp_path / "pi0")
    policy = Policy.from_pretrained(source)
    policy.backbone.check_env(tiny_pi0.SPEC)
    actor = ACTORS.get("noise").for_backbone(policy.backbone, ActorConfig(), None)
    mine = Policy(policy.backbone, "pi0", actor, "noise")
    mine.save_pretrained(tmp_path / "mine")
    held = load_file(tmp_path / "mine" / "model.safetensors")
    assert held and all(name.startswith("actor.") for name in held)
    again = Policy.from_pretrained(tmp_path / "mine")
    again.backbone.check_env(tiny_pi0.SPEC)
    obs = tiny_pi0.observations()
    assert torch.equal(again.act(obs), mine.act(obs))
    weights = load_file(source / "model.safetensors")
    first = sorted(weights)[0]
    weights[first] = weights[first] + 0.1
    save_file(weights, source / "model.safetensors")
    with pytest.raises(UserError, match=r"was finetuned from .*pi0, whose weights have"):
        Policy.from_pretrained(tmp_path / "mine")
